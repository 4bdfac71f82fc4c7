"""DIST: correlation in place of divergence."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss


def unrelated(one: Tensor, other: Tensor) -> Tensor:
    """1 - Pearson's correlation of two rows, the mean over the rows of two (R, C).

    A row without any spread correlates with none: its distance is 1.
    """
    centred = (rows - rows.mean(1, keepdim=True) for rows in (one, other))
    return 1 - F.cosine_similarity(*centred, dim=1).mean()


def dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """T^2 * (beta * inter-class + gamma * intra-class distance) of probabilities at T.

    Args:
        student: logits (N, K).
        teacher: logits (N, K).
        beta: weight of the classes of one image (rows), the mean over the images.
        gamma: weight of the images under one class (columns), the mean over the classes.
        temperature: T > 0.

    Returns:
        A scalar in float32 or wider.
    """
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * (beta * unrelated(p, q) + gamma * unrelated(p.T, q.T))


class DIST(PairLoss):
    """Correlation within each image and within each class (Huang et al., arXiv 2205.10536).

    T^2 * (beta * mean_i (1 - r(p_i:, q_i:)) + gamma * mean_k (1 - r(p_:k, q_:k))) with Pearson's r
    of the probabilities at T: a student need not be as sure as a much stronger teacher. The second
    part relates the images of a batch, so that it needs two or more. The factor T^2 is not in the
    paper, but in its code for CIFAR-100.

    Args:
        beta: weight of the relation between the classes of one image.
        gamma: weight of the relation between the images of a batch under one class.
        temperature: T; the paper takes 4 on CIFAR-100 and 1 on ImageNet.
    """

    name: Literal["dist"] = "dist"
    beta: float = Field(default=1.0, ge=0)
    gamma: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return dist(student, teacher, self.beta, self.gamma, self.temperature)
