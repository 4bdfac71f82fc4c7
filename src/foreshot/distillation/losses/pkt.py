"""Probabilistic knowledge transfer: which images lie close to which."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss
from foreshot.distillation.losses.vectors import vectors

FLOOR = 1e-6
"""Least similarity, so that opposite vectors have a logarithm, whatever the rounding."""


def neighbours(x: Tensor) -> Tensor:
    """Logarithms (N, N) of p(j|i), by which x_j is the neighbour of x_i; each row is of one x_i.

    p(j|i) is in proportion to (1 + cos(x_i, x_j)) / 2.

    Args:
        x: (N, C), a vector for each image.
    """
    unit = F.normalize(x, dim=1)
    similarity = (1 + unit @ unit.T) / 2 + FLOOR
    return similarity.log() - similarity.sum(1, keepdim=True).log()


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p(.|i) of the teacher || p(.|i) of the student), the mean over the images i.

    Args:
        student: (N, C).
        teacher: (N, D).

    Returns:
        A scalar.
    """
    return F.kl_div(
        neighbours(student), neighbours(teacher), reduction="batchmean", log_target=True
    )


class PKT(PairLoss):
    """Probabilities of being neighbours (Passalis and Tefas, arXiv 1803.10837).

    mean_i sum_j p(j|i) log(p(j|i) / q(j|i)), where p(j|i) of the teacher and q(j|i) of the student
    are in proportion to (1 + cos(x_i, x_j)) / 2. As in the authors' code the image itself is among
    its neighbours; that code takes the mean over the N x N entries, so its value is 1/N of this
    one, and its weights are to be divided by the size of its batches. Maps and tokens are averaged
    first.
    """

    name: Literal["pkt"] = "pkt"
    on_features: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pkt(vectors(student), vectors(teacher))
