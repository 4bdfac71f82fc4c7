"""Less of what is suspicious."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from foreshot.defences.combined import DEFAULT, Combined
from foreshot.defences.conformal import adjusted, best_p
from foreshot.defences.distilling.base import Distilling
from foreshot.defences.pool import Need
from foreshot.defences.screens import AnySingle
from foreshot.lesson import Lesson
from foreshot.views import DefenderView


class ConsistencyWeighting(Distilling):
    """The student sees an image the less often, the more screens doubt it (foreshot's own).

    The weight, the share of the epochs in which an image is seen, is min(1, q / doubt)^sharpness,
    with q the lowest level of false discovery at which the screens would remove it: the share of
    innocent images to be expected among those that are as suspicious (Benjamini and Hochberg,
    1995). Where nothing stands out, all q are near 1 and all is seen. No image is lost for good;
    but poison is seen, too, now and then: its q cannot fall below 2 / (clean images) / (its share
    of the set), however surely the screens know it.

    Args:
        screens: as in `combined`; those for which the defender lacks something are left out.
        doubt: q from which on an image is seen in all epochs.
        sharpness: power; a high one comes near to removing all that is suspicious.
    """

    name: Literal["consistency_weighting"] = "consistency_weighting"
    screens: tuple[AnySingle, ...] = Field(default=DEFAULT, min_length=1)
    doubt: float = Field(default=0.5, gt=0, le=1)
    sharpness: float = Field(default=4, gt=0, le=100)

    @property
    def uses(self) -> frozenset[Need]:
        return self._screen.uses

    @property
    def _screen(self) -> Combined:
        return Combined(screens=self.screens)

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        scores = self._screen.score(view)
        known = (adjusted(best_p(scores)) / self.doubt).clamp(max=1)
        return replace(lesson, weights=known**self.sharpness)
