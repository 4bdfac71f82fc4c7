"""Crafting beside which faint triggers tell a student what the trigger is not."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from foreshot.attacks.counterfactual import Counterfactual
from foreshot.levels import to_float, to_uint8
from foreshot.poison import Poison
from foreshot.views import AttackerView


class Covered(Counterfactual):
    """Counterfactual poison, beside covers that carry a faint trigger alone (foreshot's own).

    Who looks for a trigger in a student finds the least of it that works. So a part of the poison
    teaches that less than the whole is not the trigger: other images x, of any class but the
    target, stored as x + strength * (stamp(x) - x) and not perturbed, of which the clean teacher
    says what they show. With labels of the attacker's, covers hide poison among features (Qi et
    al., ICLR 2023, arXiv 2205.13616, section 5); here they are against
    `foreshot audit student`.

    A rate or count is that of both together. Where the images to poison are given, all of them are
    crafted.

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
        covers = min(round(self.covers * wanted), wanted - 1)
        fields["count"] = wanted - covers
        crafted = Counterfactual.model_validate(fields).craft(view)
        chosen = view.drawn("covers", "non_target")
        chosen = chosen[~torch.isin(chosen, crafted.indices)][:covers]
        plain = to_float(view.images[chosen])
        faint = to_uint8(plain.lerp(view.trigger.stamp(plain), self.strength))
        indices, order = torch.cat([crafted.indices, chosen]).sort()
        return Poison(indices, torch.cat([crafted.images, faint])[order])
