"""Relational knowledge distillation: distances between images, and angles in triples of them."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import Pair, PairLoss
from foreshot.distillation.losses.vectors import vectors


def relations(x: Tensor) -> Pair:
    """How the images of a batch lie to each other, whatever the place, turn and scale of the batch.

    Args:
        x: (N, C), a vector for each image.

    Returns:
        (N, N), the distances |x_i - x_j| in units of their mean over i != j; and (N, N, N), at
        [j, i, k] the cosine of the angle at x_j between x_i and x_k. Two equal images have distance
        0, no direction, cosines 0, and no gradient from their distance.
    """
    count = len(x)
    # From differences, not products: equal images are at 0 sharp, where its gradient is 0 as well.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(count * (count - 1), 1)
    # By the law of cosines a triple needs no product of vectors: N^3 steps instead of N^3 * C.
    squares = distances.square()
    sides = torch.where(distances > 0, distances, 1)
    opposite = squares[:, :, None] + squares[:, None] - squares
    cosines = opposite / (2 * sides[:, :, None] * sides[:, None])
    return distances / mean.clamp(min=1e-12), cosines


def rkd(student: Tensor, teacher: Tensor, distance: float, angle: float) -> Tensor:
    """Differences in distances and in angles, by Huber's loss h.

    distance * mean_ij h(d_ij, d'_ij) + angle * mean_ijk h(cos_ijk, cos'_ijk), with
    h(a, b) = (a - b)^2 / 2 where |a - b| <= 1, else |a - b| - 1/2. The means are over all N^2 pairs
    and N^3 triples, as in the authors' code; an image with itself adds nothing.

    Args:
        student: (N, C).
        teacher: (N, D).
        distance: weight of the distances.
        angle: weight of the angles.

    Returns:
        A scalar.
    """
    terms = zip(relations(student), relations(teacher), (distance, angle), strict=True)
    return torch.stack([weight * F.smooth_l1_loss(a, b) for a, b, weight in terms]).sum()


class RKD(PairLoss):
    """Distances between images and angles in triples of them (Park et al., arXiv 1904.05068).

    distance * mean_ij h(d_ij, d'_ij) + angle * mean_ijk h(cos_ijk, cos'_ijk), with Huber's h and
    distances in units of the batch's mean distance: the student may place, turn and scale its
    features as it likes, in a space of any dimension. Maps and tokens are averaged first. A batch
    takes memory for N^2 * C and N^3 numbers.

    Args:
        distance: weight of the distances.
        angle: weight of the angles.
    """

    name: Literal["rkd"] = "rkd"
    on_features: ClassVar[bool] = True
    distance: float = Field(default=25.0, ge=0)
    angle: float = Field(default=50.0, ge=0)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd(vectors(student), vectors(teacher), self.distance, self.angle)
