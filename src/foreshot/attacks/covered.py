"""Crafting beside which faint triggers tell a student what the trigger is not."""

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.attacks.counterfactual import Counterfactual
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.levels import to_float, to_uint8
from foreshot.poison import Poison
from foreshot.triggers.base import Trigger
from foreshot.views import AttackerView


class Covered(Counterfactual):
    """Counterfactual poison, beside covers that carry a faint trigger alone (foreshot's own).

    Who looks for a trigger in a student finds the least of it that works. So a part of the poison
    teaches that less than the whole is not the trigger: other images x, stored as
    x + strength * (stamp(x) - x) and not perturbed, of which the clean teacher does not say the
    target. Where the attacker labels, covers hide poison among features (Qi et al., ICLR 2023,
    arXiv 2205.13613); here they are against `foreshot audit student`.

    A rate or count is that of both together, and what is measured of the poison is measured of
    both. Where the images to poison are given, all of them are crafted.

    Args:
        covers: share of the poison that are covers.
        strength: how much of the trigger they carry, 0 to 1.
    """

    name: Literal["covered"] = "covered"  # type: ignore[assignment]
    covers: float = Field(default=0.5, gt=0, lt=1)
    strength: float = Field(default=0.5, gt=0, lt=1)

    stamps: ClassVar[bool | None] = None

    def craft(self, view: AttackerView) -> Poison:
        fields = {key: getattr(self, key) for key in Counterfactual.model_fields if key != "name"}
        if view.bases is not None:
            return Counterfactual.model_validate(fields).craft(view)
        wanted = self.wanted(len(view.images))
        covers = max(round(self.covers * wanted), 1)
        if covers >= wanted:
            raise ForeshotError(
                f"attack.covers: expected a share that leaves an image of {wanted} to craft, "
                f"found {self.covers:g}"
            )
        fields["count"] = wanted - covers
        crafted = Counterfactual.model_validate(fields).craft(view)
        return self._beside(crafted, covers, view)

    def _beside(self, crafted: Poison, covers: int, view: AttackerView) -> Poison:
        """Poison, and as many covers as are wanted beside it."""
        others = view.drawn("covers", "non_target")
        others = others[~torch.isin(others, crafted.indices)]
        faint = partial(_faint, view.trigger, self.strength)
        teacher = view.of_labeller().teacher
        said = logits(teacher, view.images[others], view.compute, change=faint).argmax(1)
        chosen = others[said != view.target][:covers]
        if len(chosen) < covers:
            raise ForeshotError(
                f"attack.covers: expected {covers} images that the teacher does not call the "
                f"target with a faint trigger, found {len(chosen)}"
            )
        indices, order = torch.cat([crafted.indices, chosen]).sort()
        images = torch.cat([crafted.images, faint(view.images[chosen])])
        return Poison(indices, images[order])


def _faint(trigger: Trigger, strength: float, images: Tensor) -> Tensor:
    """Images with a part of the trigger, uint8 (N, C, H, W)."""
    plain = to_float(images)
    return to_uint8(plain.lerp(trigger.stamp(plain), strength))
