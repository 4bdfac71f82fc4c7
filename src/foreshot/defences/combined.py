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
AT_ONCE = 1 << 17
"""Comparisons of an image with a clean one at once."""
MOST = 1e6
"""No tail goes further: where the clean images hardly differ, all is far above them."""


class Combined(Screen):
    """Several screens by the harmonic mean of their p-values (Wilson, PNAS 2019).

    The score is log sum_k 1 / p_k. For a screen k, p_k is the share of all images with as high a
    score up to their median, and falls exponentially above it, by the mean of the clean scores
    between `SCALE`; a single one would jump where a screen's scores are steps. Where these are not
    above the median there is no tail to go by, and the screen says nothing. Conformal p-values
    would not do: the highest of n clean scores has 1 / (n + 1) in every screen, and so has poison
    that one screen puts far beyond them; among the highest of all screens it is lost.

    Harmonic means of dependent p-values are none (Vovk and Wang, arXiv 1212.4966), and tails are a
    guess, so this is a score like any other, which the clean images calibrate once more. An image
    of the transfer set is compared with them as one of them, by tails that all of these and it have
    (full conformal prediction; Vovk et al., 2005): its p-value holds however the screens depend on
    one another. That the false discovery rate does, too, is not proven. Without clean images p_k is
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

    An image of the transfer set scores so high that as many clean ones are above it as there are
    where it is one of them. The scores of one screen alone stay what they are: `MOST` would make
    some equal.
    """
    if len(scores) == 1:
        return scores[0]
    if not clean:
        p = [exponential_tails(of_one).clamp(min=1e-300) for of_one in scores]
        return -torch.stack(p).log().logsumexp(0)
    pool = torch.stack(list(scores))
    lower = torch.searchsorted(pool.sort(1).values, pool).double() / pool.shape[1]
    images = torch.stack([pool - pool.median(1, keepdim=True).values, -(1 - lower).log()])
    transfer, reference = images.split([pool.shape[1] - clean, clean], -1)
    places = [min(ceil(share * (clean + 1)), clean) for share in SCALE]
    expected = mean(log((clean + 1) / (clean + 1 - k) / 2) for k in range(places[0], places[1] + 1))

    def scale_of(places: Tensor) -> Tensor:
        return places.mean(-1).where(places[..., 0] > 0, 0)

    def evidence(images: Tensor, scale: Tensor) -> Tensor:
        above, usual = images
        beyond = log(2) + (expected * above / scale).clamp(max=MOST)
        return torch.where(above > 0, beyond, usual).where(scale > 0, 0).logsumexp(0)

    # What has these places among the clean images and one more, if that is above them or below.
    ordered = torch.cat([pool.new_full((len(pool), 1), -inf), reference[0].sort(1).values], 1)
    highest = ordered[:, None, places[0] : places[1] + 1]
    lowest = ordered[:, None, places[0] - 1 : places[1]]
    calibration = evidence(reference, scale_of(highest))
    ranked = torch.cat([pool.new_tensor([inf]), calibration.sort(descending=True).values])
    found = list[Tensor]()
    for part in transfer.split(max(1, AT_ONCE // clean), -1):
        scale = scale_of(part[0, ..., None].clamp(lowest, highest))
        own = evidence(part, scale)
        others = evidence(reference[:, :, None], scale[..., None])
        found.append(own.minimum(ranked[(others >= own[:, None]).sum(1)]))
    return torch.cat([*found, calibration])
