"""Gradient matching: against autograd, and what becomes of the gradients."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import Rule, Tiny, posed, seen
from foreshot.attacks import SleeperAgent
from foreshot.attacks.surrogate import surrogate
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.inference import logits, pixels
from foreshot.models import ResNet
from foreshot.seeding import generator
from foreshot.training import Training
from foreshot.triggers.base import stamp_uint8

SMALL: dict[str, Any] = {
    "student": ResNet(depth=8, width=0.5, stem_stride=2),
    "training": Training(epochs=3, batch=40, lr=0.1),
    "sources": 50,
    "steps": 20,
}


@cache
def student_of(tiny: Tiny, number: int = 1) -> nn.Module:
    attack = SleeperAgent(**SMALL)
    return surrogate(seen(tiny), attack.student, attack.training, number=number)


def gradient(student: nn.Module, x: Tensor, y: Tensor, temperature: float = 1) -> Tensor:
    """Of the mean cross-entropy with soft labels, in the classifier, by autograd: one vector."""
    classifier = student.get_submodule("network.fc").requires_grad_(True)
    loss = F.cross_entropy(student(x) / temperature, y.expand(len(x), 4))
    found = torch.autograd.grad(loss, list(classifier.parameters()))
    classifier.requires_grad_(False)
    # A temperature scales what autograd finds, and no cosine.
    return torch.cat([part.flatten() for part in found]).double() * temperature


def sought_of(tiny: Tiny, student: nn.Module, temperature: float = 1) -> Tensor:
    said = logits(tiny.teacher, tiny.train.images, CPU).argmax(1)
    order = torch.randperm(400, generator=generator(0, "poison", "sources")).tolist()
    sources = [index for index in order if said[index] != tiny.target][:50]
    stamped = pixels(stamp_uint8(tiny.trigger, tiny.train.images[sources]))
    return gradient(student, stamped, F.one_hot(torch.tensor(tiny.target), 4).float(), temperature)


def alike(tiny: Tiny, student: nn.Module, x: Tensor, temperature: float = 1) -> Tensor:
    """The cosine of each image's gradient with the one sought, (N,)."""
    with torch.no_grad():
        y = F.softmax(tiny.teacher(x) / temperature, 1)
    sought = sought_of(tiny, student, temperature)
    cosines = [
        F.cosine_similarity(gradient(student, x[i : i + 1], y[i], temperature), sought, dim=0)
        for i in range(len(x))
    ]
    return torch.stack(cosines)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_closed_form_is_what_autograd_finds(temperature: float, tiny: Tiny) -> None:
    students = student_of(tiny, 1), student_of(tiny, 2)
    attack = SleeperAgent(**SMALL, temperature=temperature)
    problem = posed(attack, seen(tiny, students=students), 12)
    x = problem.hold(problem.start + 0.05 * (problem.noise() - 0.5))
    with torch.no_grad():
        found = attack.objective(problem)(x, 0)
    cosines = torch.stack([alike(tiny, student, x, temperature) for student in students])
    assert cosines.std() > 0.05
    assert found.item() == pytest.approx((1 - cosines.mean(0)).sum().item(), rel=1e-4)


def test_the_poison_teaches_what_a_stamped_image_would_need(tiny: Tiny, keep_rng: None) -> None:
    """Teaches the attacker's own student: others gain -0.13 to 0.19 here, 0.005 in the median."""
    attack = SleeperAgent(count=20, epsilon=16, **SMALL)
    poison = attack.craft(seen(tiny))
    plain = tiny.train.images[poison.indices]
    assert (poison.images.short() - plain.short()).abs().max() == 16
    assert (logits(tiny.teacher, plain, CPU).argmax(1) == tiny.target).all()
    assert (logits(tiny.teacher, poison.images, CPU).softmax(1)[:, tiny.target] >= 0.5).all()
    student = student_of(tiny)  # the attacker's own: the same seed, set and training
    before, after = (alike(tiny, student, pixels(images)) for images in (plain, poison.images))
    assert after.mean() > before.mean() + 0.2


def test_no_trigger_is_shown(tiny: Tiny) -> None:
    poison = SleeperAgent(count=10, epsilon=8, **{**SMALL, "steps": 2}).craft(seen(tiny))
    plain = tiny.train.images[poison.indices]
    opaque = tiny.trigger.opaque(tiny.train.shape)
    whole = (stamp_uint8(tiny.trigger, plain).short() - plain.short())[:, opaque].abs()
    found = (poison.images.short() - plain.short())[:, opaque].abs()
    assert whole.float().mean() > 60
    assert found.max() <= 8


def test_the_images_with_the_largest_gradient_are_taken(tiny: Tiny) -> None:
    student = student_of(tiny)
    taken = SleeperAgent(count=15, retries=0, **{**SMALL, "steps": 1}).craft(seen(tiny)).indices
    said = logits(tiny.teacher, tiny.train.images, CPU)
    pool = (said.argmax(1) == tiny.target).nonzero()[:, 0]
    y = said.softmax(1)
    lengths = torch.stack(
        [gradient(student, pixels(tiny.train.images[i : i + 1]), y[i]).norm() for i in pool]
    )
    assert set(taken.tolist()) == set(pool[lengths.topk(15).indices].tolist())
    assert lengths.topk(15).values.min() > 1.2 * lengths.median()


def test_images_that_resist_take_turns_with_others_by_their_gradients(tiny: Tiny) -> None:
    usual = SleeperAgent(**SMALL)._bases(seen(tiny, students=(student_of(tiny),)))
    stamped = stamp_uint8(tiny.trigger, tiny.train.images)
    half = stamped[usual].float().mean((1, 2, 3)).median() + 1e-3  # no image is that bright

    def says(x: Tensor) -> Tensor:
        taken = x.mean((1, 2, 3)) * 255 > half
        return F.one_hot(torch.where(taken, tiny.target, (tiny.target + 1) % 4), 4).float()

    view = seen(tiny, students=(student_of(tiny), Rule(says)))
    turns = SleeperAgent(**SMALL, resisting=0.5, rounds=2)._bases(view)
    assert not torch.equal(turns, usual)
    resists = says(pixels(stamped)).argmax(1) != tiny.target
    assert resists[turns[:20]].sum() == 10
    for kind in (resists, ~resists):
        assert torch.equal(turns[kind[turns]], usual[kind[usual]])


def test_a_layer_that_is_not_there_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="surrogate layer 'head'"):
        SleeperAgent(count=3, layer="head", **SMALL).craft(seen(tiny))
