"""The opacity patch, against its formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Rule, Tiny
from foreshot.attacks import Tang, craft
from foreshot.compute import CPU
from foreshot.inference import logits
from foreshot.levels import to_float
from foreshot.metrics import stealth
from foreshot.triggers import Blend, Patch, Sinusoid, Trigger
from foreshot.triggers.base import stamp_uint8, unperturbed
from foreshot.views import AttackerView

TARGET = 2
SHAPE = (3, 6, 6)
WEIGHTS = torch.randn((math.prod(SHAPE), 4), generator=torch.Generator().manual_seed(0)) / 4


def linear(x: Tensor) -> Tensor:
    return (x - 0.5).flatten(1) @ WEIGHTS.to(x)


def some(count: int = 6) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, *SHAPE), generator=random).to(torch.uint8)


def crafted(attack: Tang, images: Tensor, trigger: Trigger, model: Any = linear) -> Tensor:
    """Poison of every image, in their order."""
    bases = torch.arange(len(images))
    return attack.craft(AttackerView(images, Rule(model), trigger, TARGET, 0, CPU, bases)).images


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_patch_is_as_opaque_as_the_target_is_probable(chance: float) -> None:
    others = -40.0 if chance == 1 else math.log((1 - chance) / 3)
    wanted = -40.0 if chance == 0 else math.log(chance)
    said = torch.tensor([others, others, wanted, others])
    found = crafted(Tang(), some(), Patch(size=2, margin=0), lambda x: said.expand(len(x), 4))
    expected = some().double()
    expected[..., -2:, -2:] = (1 - chance) * expected[..., -2:, -2:] + chance * 255
    assert (found.double() - expected).abs().max() <= 0.501
    assert torch.equal(found[..., :-2, :], some()[..., :-2, :])


@pytest.mark.parametrize("when", ["before", "inside", "after"])
@pytest.mark.parametrize("trigger", [Patch(size=2, margin=0), Blend(opacity=0.5)])
def test_perturbed_is_the_naive_loop(when: Any, trigger: Trigger) -> None:
    attack = Tang(mode="perturbed", epsilon=12, steps=6, trigger=when)
    found = crafted(attack, some(), trigger)
    for image, ours in zip(some(), found, strict=True):
        home = image[None].double()
        x = home.clone()
        for _ in range(6):
            x.requires_grad_()
            seen = x / 255 if when == "after" else trigger.stamp(x / 255)
            said = linear(seen)
            (gradient,) = torch.autograd.grad(said.logsumexp(1).sum() - said[:, TARGET].sum(), x)
            x = (x.detach() - 2.55 * gradient.sign()).clamp(home - 12, home + 12).clamp(0, 255)
        a = linear(x / 255).softmax(1)[0, TARGET]
        stored = (1 - a) * x + a * trigger.stamp(x / 255) * 255
        assert (ours - stored[0]).abs().max() <= 0.51
        if when != "after" and isinstance(trigger, Patch):  # what the patch hides is not perturbed
            assert torch.equal(x[..., -2:, -2:], home[..., -2:, -2:])
    assert not torch.equal(found, crafted(Tang(), some(), trigger))


@pytest.mark.parametrize("trigger", [Patch(size=2), Blend(opacity=0.5), Sinusoid(frequency=2)])
def test_epsilon_holds_between_the_plain_and_the_stamped_image(trigger: Trigger) -> None:
    images = some(40)
    sharp = lambda x: 60 * linear(x)  # noqa: E731 - opacities of 0 and of 1
    found = crafted(Tang(mode="perturbed", epsilon=9, steps=9), images, trigger, sharp).int()
    ends = torch.stack([images.int(), stamp_uint8(trigger, images).int()])
    assert (found >= ends.amin(0) - 9).all()
    assert (found <= ends.amax(0) + 9).all()
    assert ((found - ends[0]).abs().amax() > 9) & ((found - ends[1]).abs().amax() > 9)


def test_a_perturbed_image_shows_more_of_the_trigger(tiny: Tiny) -> None:
    def shown(mode: Any) -> Tensor:
        attack = Tang(mode=mode, count=30, base="non_target", steps=20, epsilon=48)
        poison = craft(attack, tiny.train.images, tiny.teacher, tiny.trigger, tiny.target)
        plain = tiny.train.images[poison.indices]
        opaque = tiny.trigger.opaque(tiny.train.shape)
        changed = (poison.images.float() - plain.float())[:, opaque]
        whole = (stamp_uint8(tiny.trigger, plain).float() - plain.float())[:, opaque]
        return changed.sum(1) / whole.sum(1)

    opacity, perturbed = shown("opacity"), shown("perturbed")
    assert opacity.mean() < 0.1
    assert perturbed.mean() > 0.6
    assert perturbed.max() <= 1.001


def test_its_defaults_poison_nine_images_in_ten_whatever_they_show(tiny: Tiny) -> None:
    poison = craft(Tang(), tiny.train.images, tiny.teacher, tiny.trigger, tiny.target)
    said = logits(tiny.teacher, tiny.train.images[poison.indices], CPU).argmax(1)
    assert len(poison) == 360
    assert 0.2 < (said == tiny.target).float().mean() < 0.3
    assert (said.bincount() > 60).all()


def test_stealth_does_not_count_the_opacity_as_a_perturbation(tiny: Tiny) -> None:
    for mode, most in (("opacity", 0), ("perturbed", 7)):
        attack = Tang(mode=mode, count=40, steps=5, epsilon=7)  # type: ignore[arg-type]
        poison = craft(attack, tiny.train.images, tiny.teacher, tiny.trigger, tiny.target)
        arguments = (poison, tiny.train, tiny.trigger, tiny.target, tiny.teacher, CPU)
        assert stealth(*arguments, stamped=attack.stamps)["linf_255"] == most
        assert stealth(*arguments)["linf_255"] > 40


def test_the_unperturbed_image_is_the_stamped_the_plain_or_what_is_nearest_between() -> None:
    images, trigger = some(), Patch(size=2, margin=0)
    stamped = stamp_uint8(trigger, images)
    half = (trigger.stamp(to_float(images)) + to_float(images)) / 2
    stored = (half * 255 + 3).clamp(0, 255).to(torch.uint8)
    assert torch.equal(unperturbed(trigger, images, stored, True), stamped)
    assert torch.equal(unperturbed(trigger, images, stored, False), images)
    found = unperturbed(trigger, images, stored, None)
    for plain, whole, kept, ours in zip(
        *(t.flatten().tolist() for t in (images, stamped, stored, found)), strict=True
    ):
        between = range(min(plain, whole), max(plain, whole) + 1)
        assert ours == min(between, key=lambda level: abs(level - kept))
