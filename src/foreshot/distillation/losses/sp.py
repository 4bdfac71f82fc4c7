"""Similarity-preserving distillation: which images of a batch are alike."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss


def similarity(feature: Tensor) -> Tensor:
    """Inner products of the images' features, each row of length 1.

    Args:
        feature: (N, ...).

    Returns:
        (N, N).
    """
    flat = feature.flatten(1)
    return F.normalize(flat @ flat.T, p=2, dim=1)


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_t - G_s||_F^2 / N^2 of both similarity matrices.

    Args:
        student: (N, ...).
        teacher: (N, ...); of any other shape.

    Returns:
        A scalar.
    """
    return F.mse_loss(similarity(student), similarity(teacher))


class SP(PairLoss):
    """Similarity-preserving: which images are alike (Tung & Mori, arXiv 1907.09682).

    ||G_t - G_s||_F^2 / N^2 of a batch of N images, summed over the pairs, where G = Q Q^T of the
    flattened features Q, and each row of G is divided by its L2 norm. The features may be of any
    shapes. RepDistiller's weight is 3000. The larger the batch, the smaller the value.
    """

    name: Literal["sp"] = "sp"
    on_features: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sp(student, teacher)
