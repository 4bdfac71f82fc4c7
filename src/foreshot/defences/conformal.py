"""From scores to flagged images: p-values that hold, and few innocent ones among the flagged."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from foreshot.defences.base import Defence, Scores, Screen
from foreshot.errors import ForeshotError
from foreshot.files import read_tensors, write_tensors
from foreshot.views import DefenderView

DROP = 0.02
"""Share of innocent images given up to be rid of poison that hides among them. Of 18 poisoned sets
`combined` removes all at 2 % as at 5 %, for less accuracy (docs/safe-distillation.md). Where it has
no student to look at, poison that knew the changes of the screens stayed at 2 % in one of them."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a screen concludes.

    Args:
        flagged: indices into the transfer set, int64 (r,), ascending.
        p: p-values of its images, float64 (N,).
        target: the class that the attacker is suspected to aim at, the one that is most
            over-represented among the teacher's answers to what is flagged; None if nothing is.
        calibrated: whether the p-values come from clean images of the defender's that were scored
            as the set was. If not, they are guesses, and nothing is promised of them.
        scores: the screen's, of the images, float64 (N,).
    """

    flagged: Tensor
    p: Tensor
    target: int | None
    calibrated: bool
    scores: Tensor

    @property
    def kept(self) -> Tensor:
        """Indices of what is not flagged, int64 (N - r,), ascending."""
        return torch.ones(len(self.p)).index_fill(0, self.flagged, 0).nonzero()[:, 0]

    @property
    def ranked(self) -> Tensor:
        """Indices of all images, the most suspicious first, int64 (N,): the flagged lead."""
        return self.scores.argsort(descending=True, stable=True)

    def save(self, path: Path) -> None:
        """Writes safetensors."""
        tensors = {"flagged": self.flagged, "kept": self.kept, "p": self.p, "scores": self.scores}
        write_tensors(path, tensors, {"target": self.target, "calibrated": self.calibrated})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        tensors, about = read_tensors(path)
        del tensors["kept"]
        return cls(**tensors, **about)


def judge(
    screen: Screen,
    view: DefenderView,
    drop: float = DROP,
    *,
    level: float | None = None,
    remove: float | None = None,
) -> Verdict:
    """Flags the images with conformal p-values of `drop` or less (Vovk et al., 2005).

    So is each clean image with a probability of `drop` at most, and poison wherever fewer clean
    images than that look as suspicious: however little of it there is, and whether or not the set
    as a whole would be found out. It takes for granted that the clean set is drawn as the clean
    part of the transfer set was, and scored alike: the view's student, if the screen looks at one,
    has learned from the calibration half as from the transfer set (`view.both`). Without clean
    images the p-values are those of `exponential_tails`.

    Args:
        screen: whose scores decide.
        view: what the defender knows.
        drop: p-value up to which an image is flagged.
        level: if given, those images are flagged instead of which at most this share is expected to
            be clean, by Benjamini and Hochberg (1995) over conformal p-values (Bates et al.,
            arXiv 2104.08279; for scores that depend on the whole pool Marandon et al., arXiv
            2208.06685). A clean set then mostly stays whole. But no p-value is below 1 / (n + 1)
            with n clean images scored: where a share s of the set is poison, n has to exceed
            1 / (level s), or nothing is flagged, however surely the screen tells it from the rest.
        remove: if given, this share of the transfer set is flagged instead, whatever its p-values.

    Raises:
        ForeshotError: there are clean images, but so few that no p-value can be as low as `drop`.
    """
    if level is None and remove is None and view.clean is not None:
        check_enough(screen, len(view.clean), drop)
    scores = screen.score(view)
    p = best_p(scores)
    if remove is not None:
        order = scores.transfer.argsort(descending=True, stable=True)
        flagged = order[: round(remove * len(order))].sort().values
    elif level is not None:
        flagged = benjamini_hochberg(p, level)
    else:
        flagged = (p <= drop).nonzero()[:, 0]
    said = view.pool.teacher.said[: len(p)]
    alike = view.both or "student" not in screen.uses(view.pool.lacks)
    calibrated = len(scores.clean) > 0 and alike
    return Verdict(flagged, p, enriched(said, flagged), calibrated, scores.transfer)


def check_enough(defence: Defence, clean: int, share: float) -> None:
    """Refuses clean images of which no threshold could pass but this share.

    Half of them are scored, and no p-value by n of these is below 1 / (n + 1).
    """
    if share <= 0:
        raise ForeshotError(f"drop: expected more than 0, found {share:g}")
    needed = 2 * ceil(1 / share) - 3
    if clean < needed:
        raise ForeshotError(
            f"{defence.kind} {defence.title}: expected at least {needed} clean images "
            f"(defender.clean) for p-values of {share:g}, found {clean}, "
            f"with which none is below {1 / (clean - clean // 2 + 1):.2g}"
        )


def best_p(scores: Scores) -> Tensor:
    """P-values of the transfer set, float64 (N,): by the clean images if there are any."""
    return p_values(scores) if len(scores.clean) else exponential_tails(scores.transfer)


def p_values(scores: Scores) -> Tensor:
    """(1 + number of clean scores as high) / (1 + number of clean scores), float64 (N,)."""
    clean = scores.clean.sort().values
    higher = len(clean) - torch.searchsorted(clean, scores.transfer)
    return (1 + higher).double() / (1 + len(clean))


def exponential_tails(scores: Tensor) -> Tensor:
    """Exponential tails of scores (N,), by their own median and upper quartile: float64 (N,).

    Not calibrated. Tails of clean scores are often heavier than normal ones, with which every
    second clean set would be suspicious. Where the upper quartile is the median, there is no spread
    to go by, and nothing stands out, however far above it lies.
    """
    median, quartile = scores.quantile(scores.new_tensor([0.5, 0.75]))
    if quartile == median:
        return torch.ones_like(scores)
    return 0.5 ** (1 + (scores - median) / (quartile - median)).clamp(min=0)


def benjamini_hochberg(p: Tensor, level: float) -> Tensor:
    """Indices of the k smallest of N p-values, for the largest k with p_(k) <= level k / N."""
    order = p.sort().values
    ranks = torch.arange(1, len(p) + 1, dtype=torch.float64)  # float32 would lose ties
    passed = order <= level * ranks / len(p)
    if not passed.any():
        return torch.zeros(0, dtype=torch.int64)
    return (p <= order[passed][-1]).nonzero()[:, 0]


def enriched(said: Tensor, flagged: Tensor) -> int | None:
    """The class of `said` (N,) that is most over-represented at `flagged`, in standard errors."""
    if not len(flagged):
        return None
    share = torch.bincount(said).double() / len(said)
    found = torch.bincount(said[flagged], minlength=len(share)) - len(flagged) * share
    return int((found / (share * (1 - share)).clamp(min=1e-12).sqrt()).argmax())
