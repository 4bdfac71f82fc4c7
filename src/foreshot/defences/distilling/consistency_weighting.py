"""Less of what is suspicious."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from foreshot.defences.combined import DEFAULT, Combined
from foreshot.defences.conformal import best_p
from foreshot.defences.distilling.base import Distilling
from foreshot.defences.pool import Need
from foreshot.defences.screens import AnySingle
from foreshot.lesson import Lesson
from foreshot.views import DefenderView


class ConsistencyWeighting(Distilling):
    """The student sees an image the less often, the more screens doubt it (foreshot's own).

    The weight, the share of the epochs in which an image is seen, is min(1, p / doubt)^sharpness,
    with p its conformal p-value by the screens. No image is lost for good; of the clean ones a
    share doubt * sharpness / (sharpness + 1) goes unseen in an epoch. Poison is seen now and then,
    too: its p cannot fall below 1 / (1 + clean images scored), however surely the screens know it.

    Args:
        screens: as in `combined`; those for which the defender lacks something are left out.
        doubt: p-value from which on an image is seen in all epochs.
        sharpness: power; a high one comes near to removing all that is suspicious.
    """

    name: Literal["consistency_weighting"] = "consistency_weighting"
    screens: tuple[AnySingle, ...] = Field(default=DEFAULT, min_length=1)
    doubt: float = Field(default=0.1, gt=0, le=1)
    sharpness: float = Field(default=2, gt=0, le=100)

    def uses(self, lacks: frozenset[Need] = frozenset()) -> frozenset[Need]:
        return self._screen.uses(lacks)

    @property
    def _screen(self) -> Combined:
        return Combined(screens=self.screens)

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        known = (best_p(self._screen.score(view)) / self.doubt).clamp(max=1)
        return replace(lesson, weights=known**self.sharpness)
