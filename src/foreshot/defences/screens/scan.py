"""Two classes in one."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool
from foreshot.defences.screens.halves import halves
from foreshot.defences.screens.whitening import whitening


class Scan(Screen):
    """SCAn: a poisoned class is a mixture of two (Tang et al., arXiv 1908.00686).

    The student's features of a class are its mean plus variation that all classes share, of
    covariance S, taken from the reference images. For the images with the same answer of the
    teacher, J = sum |h - m|^2 - |h - m_i|^2 in the metric of S^-1 is twice the log-likelihood ratio
    of two groups i with means m_i over one with mean m; (J - D) / sqrt(2 D) is compared with its
    median over the classes, in units of 1.4826 times their median absolute deviation. The score of
    an image is this number, if positive, times the probability that it belongs to the group that
    lies farther from the class's reference images (the smaller one, if there are none). The groups
    are found by 2-means in the metric of S^-1; the paper's prior on class means is left out.
    """

    name: Literal["scan"] = "scan"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "student"})

    def suspicion(self, pool: Pool) -> Tensor:
        known = pool.student_on_reference.features.double()
        means, root = whitening(known, pool.teacher_on_reference.said, self.title)
        features = pool.student.features.double() @ root
        ratios, groups, belongs = [], [], torch.zeros(len(pool), dtype=torch.float64)
        for c in pool.teacher.said.unique().tolist():
            group = pool.teacher.said == c
            home = means[c] @ root if c in means else None
            ratio, belongs[group] = mixture(features[group], home)
            ratios.append((ratio - features.shape[1]) / (2 * features.shape[1]) ** 0.5)
            groups.append(group)
        index = torch.tensor(ratios, dtype=torch.float64)
        spread = 1.4826 * (index - index.median()).abs().median()
        index = ((index - index.median()) / spread.clamp(min=1e-12)).clamp(min=0)
        for anomaly, group in zip(index, groups, strict=True):
            belongs[group] *= anomaly
        return belongs


def mixture(points: Tensor, home: Tensor | None) -> tuple[float, Tensor]:
    """Twice the log-likelihood ratio of two groups over one, and who is in the odd one.

    Args:
        points: float64 (n, D), of unit covariance within a group.
        home: where a clean group's mean lies (D,), if that is known.

    Returns:
        The ratio, and the probability of each point to be of the odd group, (n,).
    """
    odd = halves(points)
    if not odd.any():
        return 0.0, torch.zeros(len(points), dtype=torch.float64)
    if home is not None:
        there, here = (points[part].mean(0) - home for part in (odd, ~odd))
        odd = odd if there.norm() >= here.norm() else ~odd
    centres = torch.stack([points[~odd].mean(0), points[odd].mean(0)])
    distances = torch.cdist(points, centres).square()
    whole = (points - points.mean(0)).square().sum()
    ratio = whole - distances.gather(1, odd.long()[:, None]).sum()
    share = odd.double().mean()
    prior = torch.stack([1 - share, share]).log()
    return float(ratio), (prior - distances / 2).softmax(1)[:, 1]
