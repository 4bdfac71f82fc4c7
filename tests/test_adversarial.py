"""Adversarial examples, and the network that tells them from clean images."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from conftest import EXAMPLES, Tiny, stripes
from foreshot import adversarial
from foreshot.adversarial import BATCH, BLIND, detector, examples, perturbed
from foreshot.compute import CPU
from foreshot.inference import pixels
from foreshot.models.checkpoint import state_digest
from foreshot.seeding import generator


@pytest.fixture(autouse=True)
def all_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "EXAMPLES", EXAMPLES)


class Linear(nn.Module):
    """Logits that are sums of pixels: their gradients are known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_of_a_linear_network_the_best_example_is_a_corner_of_the_box() -> None:
    weight = torch.randn((2, 12), generator=generator(0, "weight"))
    x = torch.rand((5, 3, 2, 2), generator=generator(0, "x"))
    y = torch.tensor([0, 1, 0, 1, 1])
    radius = torch.tensor([0.01, 0.05, 0.1, 0.2, 0.7])[:, None, None, None]
    towards = ((weight[y] - weight[1 - y]).view(5, 3, 2, 2)).sign()
    for targeted, way in ((True, 1), (False, -1)):
        z = perturbed(Linear(weight), x, y, radius, 20, generator(0, "z"), targeted=targeted)
        expected = (x + way * radius * towards).clamp(0, 1)
        assert torch.allclose(z, expected, atol=1e-6)


def test_examples_stay_in_the_box_and_raise_the_loss(tiny: Tiny) -> None:
    assert tiny.test.labels is not None
    x, y = pixels(tiny.test.images), tiny.test.labels
    losses = [F.cross_entropy(tiny.teacher(x), y).item()]
    for steps in (1, 5):
        z = perturbed(tiny.teacher, x, y, 16 / 255, steps, generator(0, "z"))
        assert not z.requires_grad
        assert (z - x).abs().max() <= 16 / 255 + 1e-6
        assert 0 <= z.min() <= z.max() <= 1
        losses.append(F.cross_entropy(tiny.teacher(z), y).item())
    assert losses == sorted(losses)
    assert losses[1] > 2 * losses[0]
    assert all(p.grad is None for p in tiny.teacher.parameters())


def test_examples_are_within_their_radius_and_lead_the_teacher_but_for_the_blind(
    tiny: Tiny,
) -> None:
    images = stripes(300, 7).images
    clean, changed = examples(tiny.teacher, images, 40 / 255, generator(0, "e"), CPU)
    assert clean.shape == changed.shape == (EXAMPLES, 1, 12, 12)  # as wholes: they are small
    assert clean.dtype == changed.dtype == torch.uint8
    known = {image.numpy().tobytes() for image in images}
    assert {image.numpy().tobytes() for image in clean} == known
    radius = (clean.short() - changed.short()).abs().flatten(1).amax(1)
    assert 5 <= radius.min() < 7
    assert 38 < radius.max() <= 40
    with torch.no_grad():
        moved = tiny.teacher(pixels(clean)).argmax(1) != tiny.teacher(pixels(changed)).argmax(1)
    blind = torch.arange(EXAMPLES) // BATCH % BLIND == 0
    # A class is drawn for each, and one in four is the image's own; many radii are small.
    assert moved[~blind].double().mean() > 0.2
    assert moved[blind].double().mean() < 0.1 * moved[~blind].double().mean()
    signs = (changed[blind].short() - clean[blind].short()).flatten(1)
    inner = (clean[blind].flatten(1) > 40) & (clean[blind].flatten(1) < 215)
    sizes = signs.abs().double().masked_fill(~inner, torch.nan)
    assert torch.allclose(sizes.nanmean(1), radius[blind].double(), atol=0.51)


def test_of_larger_images_parts_are_seen_and_both_of_the_same_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adversarial, "EXAMPLES", 320)
    images = torch.randint(256, (3, 1, 22, 12), dtype=torch.uint8, generator=generator(0, "i"))
    teacher = Linear(torch.randn((2, 264), generator=generator(0, "w")))
    clean, changed = examples(teacher, images, 8 / 255, generator(0, "e"), CPU)
    assert clean.shape == changed.shape == (320, 1, 16, 12)
    assert (clean.short() - changed.short()).abs().max() <= 8
    tops = set()
    for seen in clean:
        places = [
            (top, number)
            for number, image in enumerate(images)
            for top in range(7)
            if torch.equal(image[:, top : top + 16], seen)
        ]
        assert len(places) == 1
        tops.add(places[0][0])
    assert len(tops) > 2


def test_a_detector_tells_perturbed_images_that_it_has_not_seen(tiny: Tiny) -> None:
    network = detector(
        tiny.teacher, stripes(200, 7).images, CPU, seed=3, stage="d", level=40, epochs=4
    )
    assert not any(weight.requires_grad for weight in network.parameters())
    x, y = pixels(tiny.test.images), torch.full((len(tiny.test),), tiny.target)
    z = perturbed(tiny.teacher, x, y, 24 / 255, 10, generator(0, "z"), targeted=True)
    with torch.no_grad():
        odds = torch.cat([network(x), network(z)])
        inner = network.get_submodule("network")
        said = F.softmax(inner(x), 1)[:, 1]
    assert odds.shape == (2 * len(x),)
    assert torch.allclose(odds[: len(x)].sigmoid(), said, atol=1e-6)
    guilty = torch.arange(len(odds)) >= len(x)
    assert roc_auc_score(guilty.numpy(), odds.numpy()) > 0.95


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_stays_as_it_is_and_may_change_what_it_is_given(
    tiny: Tiny, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = deepcopy(tiny.teacher)

        def forward(self, x: Tensor) -> Tensor:
            return self.of(x.mul_(0.5).add_(0.25))

    monkeypatch.setattr(adversarial, "EXAMPLES", 64)
    teacher = Rude().train(training).requires_grad_(True)
    before = state_digest(teacher)
    with torch.no_grad():
        detector(teacher, stripes(20, 7).images, CPU, seed=0, stage="d", epochs=1)
    assert state_digest(teacher) == before
    assert all(module.training == training for module in teacher.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in teacher.parameters())


def test_a_detector_is_the_same_again_and_another_of_another_seed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, keep_rng: None
) -> None:
    monkeypatch.setattr(adversarial, "EXAMPLES", 64)
    tiny.teacher.requires_grad_(True)  # other tests distil from it, which freezes it
    images, x = stripes(20, 7).images, pixels(tiny.test.images[:8])
    made = [
        detector(tiny.teacher, images, CPU, seed=seed, stage="d", epochs=1) for seed in (0, 0, 1)
    ]
    first, again, other = [network(x) for network in made]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert any(weight.requires_grad for weight in tiny.teacher.parameters())
