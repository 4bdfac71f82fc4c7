"""Feature matching, against its formula, and what it does to features."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import Tiny, posed, seen
from foreshot.attacks import DeHiB, Pgd, craft
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.inference import logits, pixels
from foreshot.poison import Poison
from foreshot.seeding import generator

QUICK: dict[str, Any] = {"count": 24, "steps": 15, "retries": 0}


def embedding(tiny: Tiny, x: Tensor) -> Tensor:
    """What the teacher's classifier takes, float64."""
    caught: list[Tensor] = []
    classifier = tiny.teacher.get_submodule("network.fc")
    hook = classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    tiny.teacher(x)
    hook.remove()
    return caught[0].double()


@torch.no_grad()
def anchors_of(tiny: Tiny, count: int) -> Tensor:
    said = logits(tiny.teacher, tiny.train.images, CPU).argmax(1)
    order = torch.randperm(400, generator=generator(0, "poison", "anchors")).tolist()
    chosen = [index for index in order if said[index] == tiny.target][:count]
    assert len(chosen) == count
    return embedding(tiny, pixels(tiny.train.images[chosen]))


@torch.no_grad()
def test_the_objective_is_that_of_the_docstring(tiny: Tiny, keep_rng: None) -> None:
    attack = DeHiB(weight=0.3, temperature=4, anchors=7)
    problem = posed(attack, seen(tiny), 8)
    x = problem.hold(problem.start + 0.1 * (problem.noise() - 0.5))
    probability = F.softmax(tiny.teacher(x).double() / 4, 1)[:, tiny.target]
    distances = (embedding(tiny, x)[:, None] - anchors_of(tiny, 7)[None]).pow(2).sum(2)
    expected = -probability.log().sum() + 0.3 * distances.min(1).values.sum()
    assert attack.objective(problem)(x, 0).item() == pytest.approx(expected.item(), rel=1e-4)
    assert len(distances.argmin(1).unique()) > 1


def test_its_gradient_is_that_of_the_formula(tiny: Tiny) -> None:
    """The nearest anchor is a constant: no gradient goes through the choice, or to the anchors."""
    attack = DeHiB(weight=0.5, anchors=5)
    problem = posed(attack, seen(tiny), 4)
    x = problem.start.clone().requires_grad_()
    (found,) = torch.autograd.grad(attack.objective(problem)(x, 0), x)
    distances = (embedding(tiny, x)[:, None] - anchors_of(tiny, 5)[None]).pow(2).sum(2)
    loss = -F.log_softmax(tiny.teacher(x), 1)[:, tiny.target].sum()
    (expected,) = torch.autograd.grad(loss + 0.5 * distances.amin(1).sum(), x)
    assert torch.allclose(found, expected.float(), rtol=1e-3, atol=1e-4 * float(found.abs().max()))


def test_without_weight_it_is_pgd(tiny: Tiny, keep_rng: None) -> None:
    like: dict[str, Any] = {"epsilon": 32, "trigger": "before", "random_start": False, **QUICK}
    naive = Pgd(**like).craft(seen(tiny))
    assert DeHiB(weight=0, **QUICK).craft(seen(tiny)).digest == naive.digest
    assert DeHiB(**QUICK).craft(seen(tiny)).digest != naive.digest


def test_the_poison_has_the_features_of_the_target(tiny: Tiny, keep_rng: None) -> None:
    def distance(poison: Poison) -> float:
        with torch.no_grad():
            found = embedding(tiny, pixels(poison.images))
        return torch.cdist(found, anchors_of(tiny, 80)).amin(1).mean().item()

    naive = Pgd(epsilon=32, trigger="before", random_start=False, **QUICK).craft(seen(tiny))
    ours = DeHiB(anchors=80, **QUICK).craft(seen(tiny))
    said = logits(tiny.teacher, ours.images, CPU).argmax(1)
    assert (said == tiny.target).float().mean() >= 0.9
    assert distance(ours) < 0.9 * distance(naive)


def test_a_layer_that_is_not_there_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="teacher layer 'network.layer9'"):
        DeHiB(layer="network.layer9", **QUICK).craft(seen(tiny))


def test_a_target_that_the_teacher_never_says_cannot_be_matched(tiny: Tiny) -> None:
    said = logits(tiny.teacher, tiny.train.images, CPU).argmax(1)
    others = tiny.train.images[said != tiny.target]
    with pytest.raises(ForeshotError, match="expected images that the teacher calls target"):
        craft(DeHiB(count=3), others, tiny.teacher, tiny.trigger, tiny.target)
