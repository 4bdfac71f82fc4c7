"""Variational information distillation: how probable the student makes the teacher's features."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.distillation.losses.base import Loss, Pair, Signals, maps, same_size
from foreshot.models.base import convolution

LEAST = 1e-5
"""What is added to every variance, so that none is zero."""


def vid(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """((t - mean)^2 / variance + log variance) / 2, the mean over all elements.

    It is the negative log-likelihood of a Gaussian less its constant, and so may be negative.

    Args:
        mean: (N, C, H, W), what is expected of the teacher.
        variance: (C,), above 0.
        teacher: (N, C, H, W).

    Returns:
        A scalar.
    """
    variance = variance[:, None, None]
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


class Regressor(nn.Module):
    """A Gaussian for each element of the teacher's maps; its variance is one a channel."""

    def __init__(self, student: int, teacher: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            convolution(student, teacher, 1),
            nn.ReLU(),
            convolution(teacher, teacher, 1),
            nn.ReLU(),
            convolution(teacher, teacher, 1),
        )
        above = variance - LEAST
        # The inverse of softplus, without the overflow of exp.
        self.raw = nn.Parameter(torch.full((teacher,), above + math.log(-math.expm1(-above))))

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(student), F.softplus(self.raw) + LEAST


class VID(Loss):
    """Variational information, a bound on what both share (Ahn et al., arXiv 1904.05835).

    mean ((F_t - mu(F_s))^2 / v + log v) / 2, summed over the pairs: a Gaussian's negative
    log-likelihood without its constant, so it may be negative. As in RepDistiller, whose code is
    the authors', mu is three 1 x 1 convolutions of the teacher's channels with ReLU between them,
    and the variance of each channel v = softplus(a) + 1e-5; mu and a are learned with the student.
    The paper sums over channels and positions, the code takes the mean, with a weight of 1. Larger
    maps are averaged down to the smaller.

    Args:
        variance: v at the start; lower pulls the student harder at first.
    """

    name: Literal["vid"] = "vid"
    variance: float = Field(default=5.0, ge=1e-3)
    on_features: ClassVar[bool] = True

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.ModuleList:  # noqa: ARG002
        channels = [[maps(feature).shape[1] for feature in pair] for pair in pairs]
        return nn.ModuleList(Regressor(ours, theirs, self.variance) for ours, theirs in channels)

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        assert isinstance(learned, nn.ModuleList)
        values = []
        for pair, regressor in zip(signals.pairs, learned, strict=True):
            student, teacher = same_size(*pair)
            mean, variance = regressor(student)
            values.append(vid(mean, variance, teacher))
        return torch.stack(values).sum()
