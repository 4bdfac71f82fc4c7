"""From scores to flagged images: p-values that hold, and few innocent ones among the flagged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from foreshot.defences.base import Scores, Screen
from foreshot.files import read_tensors, write_tensors
from foreshot.views import DefenderView


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a screen concludes.

    Args:
        flagged: indices into the transfer set, int64 (r,), ascending.
        p: p-values of its images, float64 (N,).
        target: the class that the attacker is suspected to aim at, the one that is most
            over-represented among the teacher's answers to what is flagged; None if nothing is.
        calibrated: whether the p-values come from clean images of the defender's. If not, they
            are guesses, and nothing is promised of them.
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
    screen: Screen, view: DefenderView, level: float = 0.05, remove: float | None = None
) -> Verdict:
    """Flags images so that at most a share `level` of them is expected to be clean.

    The promise is that of Benjamini and Hochberg (1995) over conformal p-values (Bates et al.,
    arXiv 2104.08279; for scores that depend on the whole pool Marandon et al., arXiv 2208.06685).
    It takes for granted that the clean set is drawn as the clean part of the transfer set was. No
    p-value is below 1 / (n + 1) with n clean images scored: where a share s of the set is poison,
    n has to exceed 1 / (level s), or nothing can be flagged.

    Args:
        screen: whose scores decide.
        view: what the defender knows. Without a clean set the p-values are those of `normal_tails`.
        level: false discovery rate.
        remove: if given, this share of the transfer set is flagged, whatever its p-values.
    """
    scores = screen.score(view)
    calibrated = len(scores.clean) > 0
    p = best_p(scores)
    if remove is None:
        flagged = benjamini_hochberg(p, level)
    else:
        order = scores.transfer.argsort(descending=True, stable=True)
        flagged = order[: round(remove * len(order))].sort().values
    said = view.pool.teacher.said[: len(p)]
    return Verdict(flagged, p, enriched(said, flagged), calibrated, scores.transfer)


def best_p(scores: Scores) -> Tensor:
    """P-values of the transfer set, float64 (N,): by the clean images if there are any."""
    return p_values(scores) if len(scores.clean) else normal_tails(scores.transfer)


def p_values(scores: Scores) -> Tensor:
    """(1 + number of clean scores as high) / (1 + number of clean scores), float64 (N,)."""
    clean = scores.clean.sort().values
    higher = len(clean) - torch.searchsorted(clean, scores.transfer)
    return (1 + higher).double() / (1 + len(clean))


def normal_tails(scores: Tensor) -> Tensor:
    """Normal tails of scores (N,), by their own median and median absolute deviation.

    Not calibrated: right only if clean scores are normal and most images are clean. Where more than
    a half are equal there is no spread to go by, and nothing stands out.
    """
    centred = scores - scores.median()
    spread = 1.4826 * centred.abs().median()
    return torch.special.ndtr(-centred / spread) if spread > 0 else torch.ones_like(scores)


def benjamini_hochberg(p: Tensor, level: float) -> Tensor:
    """Indices of the k smallest of N p-values, for the largest k with p_(k) <= level k / N."""
    order = p.sort().values
    passed = order <= level * torch.arange(1, len(p) + 1) / len(p)
    if not passed.any():
        return torch.zeros(0, dtype=torch.int64)
    return (p <= order[passed][-1]).nonzero()[:, 0]


def adjusted(p: Tensor) -> Tensor:
    """The lowest level at which `benjamini_hochberg` flags each of N p-values, at most 1: (N,).

    min_{k >= rank of p_i} p_(k) N / k.
    """
    ascending, order = p.sort(stable=True)
    levels = (ascending * len(p) / torch.arange(1, len(p) + 1)).flip(0).cummin(0).values.flip(0)
    return torch.empty_like(p).scatter(0, order, levels.clamp(max=1))


def enriched(said: Tensor, flagged: Tensor) -> int | None:
    """The class of `said` (N,) that is most over-represented at `flagged`, in standard errors."""
    if not len(flagged):
        return None
    share = torch.bincount(said).double() / len(said)
    found = torch.bincount(said[flagged], minlength=len(share)) - len(flagged) * share
    return int((found / (share * (1 - share)).clamp(min=1e-12).sqrt()).argmax())
