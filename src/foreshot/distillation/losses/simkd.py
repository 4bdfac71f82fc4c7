"""The loss of SimKD, whose student has the classifier of its teacher."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss, same_size
from foreshot.errors import ForeshotError


def simkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the images, channels and positions.

    Args:
        student: (N, C), (N, T, C) or (N, C, H, W).
        teacher: the same; its size may be another.

    Returns:
        A scalar.

    Raises:
        ForeshotError: they have different numbers of channels.
    """
    one, other = same_size(student, teacher)
    if one.shape[1] != other.shape[1]:
        raise ForeshotError(
            "simkd: expected features of as many channels, from a student that projects to its "
            f"teacher's, found {one.shape[1]} of the student and {other.shape[1]} of the teacher"
        )
    return F.mse_loss(one, other)


class SimKD(PairLoss):
    """The teacher's last feature, for its reused classifier (Chen et al., arXiv 2203.14001).

    mean (F_s - F_t)^2, summed over the pairs. F_t is what the teacher's classifier gets, before the
    average over positions, and F_s what the student's projector makes for the same classifier: the
    projector is a part of the student, and the loss learns nothing. The paper trains on this alone.
    Larger maps are averaged down to the smaller.
    """

    name: Literal["simkd"] = "simkd"
    on_features: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return simkd(student, teacher)
