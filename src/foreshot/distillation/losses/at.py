"""Attention transfer: where a network looks."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss, same_size
from foreshot.errors import ForeshotError


def attention(feature: Tensor, power: float) -> Tensor:
    """The mean over the channels of |F|^p, as a vector of length 1.

    Args:
        feature: (N, C, H, W).
        power: p >= 1.

    Returns:
        (N, H W).
    """
    return F.normalize(feature.abs().pow(power).mean(1).flatten(1))


def at(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Mean squared difference of both attention maps, over the images and positions.

    Args:
        student: (N, T, C) or (N, C, H, W).
        teacher: the same; its C and size may be others.
        power: p >= 1.

    Returns:
        A scalar.

    Raises:
        ForeshotError: there is only one position, and so nothing to attend to.
    """
    one, other = same_size(student, teacher)
    if one.shape[2:].numel() == 1:
        raise ForeshotError(
            "at: expected features of more than one position, found "
            f"{tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher"
        )
    return F.mse_loss(attention(one, power), attention(other, power))


class AT(PairLoss):
    """Attention transfer: where the channels are active (Zagoruyko et al., arXiv 1612.03928).

    mean (Q_s - Q_t)^2, summed over the pairs, where Q is the map mean_c |F_c|^p, flattened and
    divided by its L2 norm. The mean over images and positions is that of the authors' code and of
    RepDistiller, whose weight is 1000; the paper's formula has the norm of the difference, not
    squared. Larger maps are averaged down to the smaller.

    Args:
        power: p; higher looks only where the activity is highest.
    """

    name: Literal["at"] = "at"
    power: float = Field(default=2.0, ge=1)
    on_features: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return at(student, teacher, self.power)
