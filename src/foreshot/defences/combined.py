"""Several screens as one."""

from collections.abc import Iterable, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from foreshot.defences.base import Scores, Screen
from foreshot.defences.conformal import exponential_tails, p_values
from foreshot.defences.pool import Need, Pool
from foreshot.defences.screens import (
    AnySingle,
    Detector,
    Frequency,
    LabelDisagreement,
    NearDuplicate,
    Scan,
    SecondTeacher,
    TeacherConsistency,
)
from foreshot.errors import ForeshotError

DEFAULT: tuple[AnySingle, ...] = (
    TeacherConsistency(),
    SecondTeacher(),
    LabelDisagreement(),
    Frequency(),
    Detector(),
    NearDuplicate(),
    Scan(),
)


class Combined(Screen):
    """Several screens by the harmonic mean of their p-values (Wilson, PNAS 2019).

    The score is log sum_k 1 / p_k, with p_k the conformal p-value of screen k. Harmonic means of
    dependent p-values are none (Vovk and Wang, arXiv 1212.4966), so this is a score like any other,
    which the clean images calibrate once more. For that a clean image's p_k counts it among the
    clean images, as it is one, which never makes it less suspicious than an image of the transfer
    set with the same score: each final p-value holds however the screens depend on one another.
    That the false discovery rate does, too, is not proven for them. Without clean images p_k is
    guessed; the logarithm then has the exponential tail by which p is guessed in turn.

    Args:
        screens: those for which the defender lacks something are left out.
    """

    name: Literal["combined"] = "combined"
    screens: tuple[AnySingle, ...] = Field(default=DEFAULT, min_length=1)

    @model_validator(mode="after")
    def _no_screen_twice(self) -> Self:
        for number, screen in enumerate(self.screens):
            if screen in self.screens[:number]:
                raise ValueError(f"found the screen {screen.name} twice")
        return self

    def uses(self, lacks: frozenset[Need] = frozenset()) -> frozenset[Need]:
        return frozenset[Need]().union(*(screen.needs for screen in usable(self.screens, lacks)))

    def suspicion(self, pool: Pool) -> Tensor:
        screens = usable(self.screens, pool.lacks)
        if not screens:
            raise ForeshotError(
                f"screen combined: expected what one of its screens needs, "
                f"found no {', '.join(sorted(pool.lacks))}"
            )
        clean = 0 if pool.calibration is None else len(pool.calibration)
        return combined([screen.suspicion(pool) for screen in screens], clean)


def usable(screens: Iterable[Screen], lacks: frozenset[Need]) -> list[Screen]:
    """Those for which nothing is lacking."""
    return [screen for screen in screens if not screen.needs & lacks]


def combined(scores: Sequence[Tensor], clean: int) -> Tensor:
    """Scores of several screens, each float64 (N,), as one; the last `clean` images are clean.

    Those of one screen stay what they are: their p-values would tie the clean image that comes next
    with what stands out, and halve what can be told.
    """
    if len(scores) == 1:
        return scores[0]
    return torch.stack([evidence(of_one, clean) for of_one in scores]).sum(0).log()


def evidence(scores: Tensor, clean: int) -> Tensor:
    """1 / p of the images of a pool, float64 (N,), of which the last `clean` are clean."""
    if not clean:
        return 1 / exponential_tails(scores).clamp(min=1e-300)
    p = p_values(Scores(scores, scores[-clean:]))
    p[-clean:] -= 1 / (1 + clean)  # a clean image is among the clean ones already
    return 1 / p
