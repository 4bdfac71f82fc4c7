"""Several screens as one."""

from collections.abc import Iterable, Sequence
from math import ceil, inf, log
from statistics import mean
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

SCALE = (0.97, 0.99)
"""Shares of the clean images between which tails are measured. On fashion-mnist-10k all of these
tell poison alike; at 0.95, scores with heavier tails than exponential ones drown `detector`'s."""
MOST = 1e6
"""No tail goes further: where the clean images hardly differ, all is far above them."""
ROUNDING = 1e-9
"""Images with the same scores differ by less."""


class Combined(Screen):
    """Several screens by the harmonic mean of their p-values (Wilson, PNAS 2019).

    The score is log sum_k 1 / p_k. For a screen k, p_k is the share of all images with as high a
    score up to their median, and falls exponentially above it, by the mean of the clean scores
    between `SCALE`; a single one would jump where a screen's scores are steps. Where the lowest of
    these is no higher than the median there is no tail to go by, and the screen says nothing.
    Conformal p-values would not do: the highest of n clean scores has 1 / (n + 1) in every screen,
    and so has poison that one screen puts far beyond them; among the highest of all screens it is
    lost.

    Harmonic means of dependent p-values are not p-values (Vovk and Wang, arXiv 1212.4966), and
    tails are a guess, so this is a score like any other, which the clean images calibrate once
    more. An image of the transfer set is compared with them as if it were one of them, by tails
    that are measured on them and it together (full conformal prediction; Vovk et al., 2005). Where
    k of them score at least as high, it gets the score of the k-th highest clean one at most, so
    that `p_values` counts k. So each final p-value holds, however the screens depend on one
    another. That the false discovery rate does, too, is not proven. Without clean images p_k is
    that of `exponential_tails`; the logarithm then has the exponential tail by which p is guessed
    in turn.

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

    The scores of one screen alone stay what they are: `MOST` would make some equal.

    Raises:
        ForeshotError: a score is not finite.
    """
    pool = torch.stack(list(scores))
    if not pool.isfinite().all():
        raise ForeshotError("screen combined: expected finite scores of each screen, found others")
    if len(pool) == 1:
        return pool[0]
    if not clean:
        p = [exponential_tails(of_one).clamp(min=1e-300) for of_one in pool]
        return -torch.stack(p).log().logsumexp(0)
    share_below = torch.searchsorted(pool.sort(1).values, pool).double() / pool.shape[1]
    above, usual = pool - pool.median(1, keepdim=True).values, -(1 - share_below).log()
    first, last = (min(ceil(share * (clean + 1)), clean) for share in SCALE)
    # The mean of -log(2 p) at these ranks, if the tail is exponential: p of what is `scale` above.
    expected = mean(log((clean + 1) / (clean + 1 - k) / 2) for k in range(first, last + 1))
    ordered = above[:, -clean:].sort(1).values
    ordered = torch.cat([pool.new_full((len(pool), 1), -inf), ordered], 1)
    within = ordered[:, first:last].sum(1, keepdim=True)

    def scale_with(above: Tensor) -> Tensor:
        """The mean at the ranks `first` to `last` of clean scores and one more; 0 without tail."""
        low, high = (above.clamp(ordered[:, [first - 1]], ordered[:, [k]]) for k in (first, last))
        return ((within + high) / (last - first + 1)).where(low > 0, 0)

    def evidence(above: Tensor, usual: Tensor, scale: Tensor) -> Tensor:
        tail = log(2) + (expected * above / scale).clamp(max=MOST)
        return torch.where(above > 0, tail, usual).where(scale > 0, 0).logsumexp(0)

    total = evidence(above, usual, scale_with(pool.new_tensor(inf)))
    ranked = torch.cat([pool.new_tensor([inf]), total[-clean:].sort(descending=True).values])
    scales, which = scale_with(above[:, :-clean]).unique(dim=1, return_inverse=True)
    own = evidence(above[:, :-clean], usual[:, :-clean], scales[:, which])
    as_high = torch.zeros_like(which)
    for scale, mine in zip(scales.T, which.argsort().split(which.bincount().tolist()), strict=True):
        others = evidence(above[:, -clean:], usual[:, -clean:], scale[:, None]).sort().values
        as_high[mine] = clean - torch.searchsorted(others, own[mine] - ROUNDING)
    total[:-clean] = total[:-clean].minimum(ranked[as_high])
    return total
