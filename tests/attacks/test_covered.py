"""Covers: faint triggers that the teacher does not call the target."""

from dataclasses import replace

import pytest
import torch

from conftest import Tiny
from foreshot.attacks import Counterfactual, Covered
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
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
    said = logits(tiny.teacher, poison.images[~both], CPU).argmax(1)
    assert (said != tiny.target).all()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"count": 1}, "attack.covers: expected a share that leaves an image of 1 to craft"),
        ({"count": 150, "covers": 0.98}, "expected 147 images that the teacher does not call the"),
    ],
)
def test_too_few_images_are_refused(fields: dict[str, float], sentence: str, tiny: Tiny) -> None:
    view = seen(tiny)
    if fields["count"] > 1:
        view = replace(view, images=view.images[:150])
    with pytest.raises(ForeshotError, match=sentence):
        Covered.model_validate(QUICK | fields).craft(view)
