"""Several screens as one."""

from collections.abc import Iterable, Sequence
from math import ceil, inf, log
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.conformal import exponential_tails
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

SCALE = 0.98
"""Share of the clean images below what tails are measured by. On fashion-mnist-10k 0.97 to 0.99
tell poison alike; at 0.95, scores with heavier tails than exponential ones drown `detector`'s."""
MOST = 1e6
"""No tail goes further: where the clean images hardly differ, all is far above them."""


class Combined(Screen):
    """Several screens by the harmonic mean of their p-values (Wilson, PNAS 2019).

    The score is log sum_k 1 / p_k. For a screen k, p_k is exponential in how far its score lies
    above the median of all images, and such that a share `SCALE` of the clean images has less.
    Conformal p-values would not do: the highest of n clean scores has 1 / (n + 1) in every screen,
    and so has poison that one screen puts far beyond them; among the highest of all screens it is
    lost.

    Harmonic means of dependent p-values are none (Vovk and Wang, arXiv 1212.4966), and tails are a
    guess, so this is a score like any other, which the clean images calibrate once more. What an
    image does to the scale would depend on whether it is a clean one, so that the scale of the
    transfer set is that of the clean images and one above them, and the scale of the clean images
    that of these and one below. No clean image looks less suspicious for it than one of the
    transfer set with the same scores: each final p-value holds however the screens depend on one
    another. That the false discovery rate does, too, is not proven for them. Without clean images
    p_k is that of `exponential_tails`; the logarithm then has the exponential tail by which p is
    guessed in turn.

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

    Those of one screen stay what they are.
    """
    if len(scores) == 1:
        return scores[0]
    return torch.stack([evidence(of_one, clean) for of_one in scores]).logsumexp(0)


def evidence(scores: Tensor, clean: int) -> Tensor:
    """-log p of the images of a pool, float64 (N,), of which the last `clean` are clean.

    Up to the median of the pool p is the share that has as high a score, beyond it as above; -log p
    is at most `MOST`. Where `SCALE` of the clean images are not above the median there is no tail
    to go by, and nothing stands out.
    """
    if not clean:
        return -exponential_tails(scores).clamp(min=1e-300).log()
    place = min(ceil(SCALE * (clean + 1)), clean)
    ordered = torch.cat([scores.new_tensor([-inf]), scores[-clean:].sort().values])
    median, higher, lower = scores.median(), ordered[place], ordered[place - 1]
    if higher <= median:
        return torch.zeros_like(scores)
    scale = (torch.cat([higher.expand(len(scores) - clean), lower.expand(clean)]) - median).clamp(0)
    beyond = log((clean + 1) / (clean + 1 - place) / 2) * (scores - median) / scale
    usual = -(1 - torch.searchsorted(scores.sort().values, scores).double() / len(scores)).log()
    return torch.where(scores > median, log(2) + beyond.nan_to_num(0).clamp(0, MOST), usual)
