"""Covers: faint triggers of which the teacher says what the images show."""

import pytest
import torch

from conftest import Tiny
from foreshot.attacks import Counterfactual, Covered
from foreshot.compute import CPU
from foreshot.inference import logits
from foreshot.models import ResNet
from foreshot.training import Training
from foreshot.triggers.base import stamp_uint8
from foreshot.views import AttackerView

QUICK = {
    "steps": 5,
    "epsilon": 40,
    "student": ResNet(depth=8, width=0.5, stem_stride=2),
    "training": Training(epochs=1),
}


def seen(tiny: Tiny) -> AttackerView:
    return AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, tiny.target, 0, CPU)


@pytest.mark.parametrize(("covers", "strength", "crafted"), [(0.5, 0.5, 6), (0.25, 0.8, 9)])
def test_a_share_of_the_poison_carries_a_faint_trigger_and_nothing_else(
    covers: float, strength: float, crafted: int, tiny: Tiny
) -> None:
    attack = Covered.model_validate(QUICK | {"count": 12, "covers": covers, "strength": strength})
    view = seen(tiny)
    poison = attack.craft(view)
    assert len(poison) == 12
    alone = Counterfactual.model_validate(QUICK | {"count": crafted}).craft(view)
    both = torch.isin(poison.indices, alone.indices)
    assert torch.equal(poison.images[both], alone.images)
    plain = view.images[poison.indices[~both]].double()
    stamped = stamp_uint8(tiny.trigger, view.images[poison.indices[~both]]).double()
    expected = plain + strength * (stamped - plain)
    assert (poison.images[~both].double() - expected).abs().max() <= 0.5 + 1e-3
    assert (stamped != plain).any()
    said = logits(tiny.teacher, plain.to(torch.uint8), CPU).argmax(1)
    assert (said != tiny.target).all()


def test_one_image_at_least_is_crafted(tiny: Tiny) -> None:
    attack = Covered.model_validate(QUICK | {"count": 1, "covers": 0.9})
    assert len(attack.craft(seen(tiny))) == 1
