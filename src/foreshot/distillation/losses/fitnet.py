"""FitNet's hints: a feature of the teacher, regressed from one of the student."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshot.distillation.losses.base import Loss, Pair, Signals, maps, same_size


def fitnet(student: Tensor, teacher: Tensor, regressor: nn.Module) -> Tensor:
    """Mean squared error of the regressed student, over the images, channels and positions.

    Args:
        student: (N, C), (N, T, C) or (N, C, H, W).
        teacher: the same; its C and size may be others.
        regressor: (N, C, H, W) -> the teacher's channels, without a change of size.

    Returns:
        A scalar.
    """
    one, other = same_size(student, teacher)
    return F.mse_loss(regressor(one), other)


class FitNet(Loss):
    """Hints: the student's feature, regressed on the teacher's (Romero et al., arXiv 1412.6550).

    mean (r(F_s) - F_t)^2, summed over the pairs. The mean is RepDistiller's (Tian et al., arXiv
    1910.10699), and so is its weight of 100; the paper has half the squared norm. The regressor r
    is the paper's convolution, learned with the student: 1 x 1, with a bias. Behind it is no
    normalisation and no ReLU, which RepDistiller adds: a plain convolution reaches features from
    before an activation as well as from after it. Larger maps are averaged down to the smaller,
    where paper and RepDistiller change the size by the convolution's kernel and stride.
    """

    name: Literal["fitnet"] = "fitnet"
    on_features: ClassVar[bool] = True

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.ModuleList:  # noqa: ARG002
        channels = [[maps(feature).shape[1] for feature in pair] for pair in pairs]
        return nn.ModuleList(nn.Conv2d(ours, theirs, 1) for ours, theirs in channels)

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        assert isinstance(learned, nn.ModuleList)
        values = [fitnet(*pair, r) for pair, r in zip(signals.pairs, learned, strict=True)]
        return torch.stack(values).sum()
