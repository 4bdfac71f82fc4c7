"""The overhaul of feature distillation: features from before the activation."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from foreshot.distillation.losses.base import Loss, Pair, Signals, same_size
from foreshot.models.base import convolution, kaiming


def negative_mean(feature: Tensor) -> Tensor:
    """The mean of each channel's negative responses, 0 where there is none.

    Args:
        feature: (N, C, H, W).

    Returns:
        (C,), never above 0.
    """
    count = (feature < 0).sum((0, 2, 3))
    return feature.clamp(max=0).sum((0, 2, 3)) / count.clamp(min=1)


def ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Partial squared distance to max(teacher, margin), the mean over the images.

    It is summed over channels and positions. Where both are negative, a student that is below the
    target costs nothing: the activation makes zero of both.

    Args:
        student: (N, C, H, W).
        teacher: the same.
        margin: (C,), not above 0.

    Returns:
        A scalar.
    """
    target = torch.maximum(teacher, margin[:, None, None])
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).flatten(1).sum(1).mean()


class Connector(nn.Module):
    """From the student's channels to the teacher's; it keeps the margin of each of these."""

    margin: Tensor

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        channels = teacher.shape[1]
        self.connect = nn.Sequential(
            convolution(student.shape[1], channels, 1), nn.BatchNorm2d(channels)
        )
        kaiming(self)
        self.register_buffer("margin", negative_mean(teacher))

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        return self.connect(student), self.margin


class OFD(Loss):
    """Overhaul of feature distillation, before the activation (Heo et al., arXiv 1904.01866).

    Of each pair, sum d(r(F_s), max(F_t, m)), the mean over the images, with d(s, t) = 0 where
    s <= t <= 0, else (s - t)^2; r is a 1 x 1 convolution with batch normalisation, learned with the
    student. The margin m of a channel is its mean negative response; here over the images of the
    example, where the authors take it from the batch normalisation before. Name layers before
    their ReLU: after it nothing is negative, m is 0, and it is a squared distance of activations.

    Name the pairs from shallow to deep: as in the authors' code each counts half as much as the
    next, and the last counts whole. It is a sum, as theirs, and large: their weight is 0.001 for
    small images. Larger maps are averaged down to the smaller.
    """

    name: Literal["ofd"] = "ofd"
    on_features: ClassVar[bool] = True

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.ModuleList:  # noqa: ARG002
        return nn.ModuleList(Connector(*same_size(*pair)) for pair in pairs)

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        assert isinstance(learned, nn.ModuleList)
        values = []
        for pair, connector in zip(signals.pairs, learned, strict=True):
            student, teacher = same_size(*pair)
            connected, margin = connector(student)
            values.append(ofd(connected, teacher, margin) / 2 ** (len(learned) - 1 - len(values)))
        return torch.stack(values).sum()
