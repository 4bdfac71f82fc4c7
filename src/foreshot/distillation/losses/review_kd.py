"""Knowledge review: the deep stages of a student help the shallow ones."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.distillation.losses.base import Loss, Pair, Signals, maps
from foreshot.errors import ForeshotError
from foreshot.models.base import convolution

LEVELS = 4, 2, 1
"""Sides to which maps are averaged down."""


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss: the mean squared error of the maps, and of smaller ones.

    The error at full size counts 1, and each of the smaller sizes half as much as the one before;
    the sum is divided by that of its weights. Sizes that the maps do not exceed are left out.

    Args:
        student: (N, C, H, W).
        teacher: the same.

    Returns:
        A scalar.
    """
    height, width = student.shape[2:]
    sizes = [(min(k, height), min(k, width)) for k in LEVELS if k < max(height, width)]
    values = [F.mse_loss(student, teacher)]
    for size in sizes:
        one, other = (F.adaptive_avg_pool2d(feature, size) for feature in (student, teacher))
        values.append(F.mse_loss(one, other))
    weights = [0.5**level for level in range(len(values))]
    weighted = [w * v for w, v in zip(weights, values, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of a stage with what comes from the deeper stages.

    Args:
        student: the student's channels.
        width: the channels of what is handed on.
        teacher: the teacher's channels.
        deepest: there is nothing deeper to fuse with.
    """

    def __init__(self, student: int, width: int, teacher: int, deepest: bool) -> None:
        super().__init__()
        enter, leave = convolution(student, width, 1), convolution(width, teacher, 3)
        for layer in (enter, leave):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(width))
        self.attend = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(teacher))

    def forward(
        self, student: Tensor, deeper: Tensor | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What to compare with the teacher, (N, teacher, *size), and what to hand on."""
        fused = self.enter(student)
        if self.attend is not None:
            assert deeper is not None
            deeper = _resized(deeper, fused.shape[2:])
            ours, theirs = self.attend(torch.cat([fused, deeper], 1)).sigmoid().split(1, 1)
            fused = ours * fused + theirs * deeper
        fused = _resized(fused, size)
        return self.leave(fused), fused


class ReviewKD(Loss):
    """Knowledge review: deep stages help shallow ones (Chen et al., arXiv 2104.09044).

    All pairs are one chain; name them from shallow to deep. Going from deep to shallow, each stage
    of the student is brought to a common width by a 1 x 1 convolution and fused (ABF) with what the
    deeper ones hand on, a F + b up(deeper) with weights a, b in (0, 1) for each position, from a
    1 x 1 convolution of both and a sigmoid. A 3 x 3 convolution brings it to the teacher's
    channels, where the hierarchical context loss (HCL) compares it with the teacher's stage: the
    mean squared errors of the maps at full size and averaged down to sides 4, 2 and 1, weighted 1,
    1/2, 1/4, 1/8 over their sum. All convolutions are learned with the student, with batch
    normalisation. Maps of other sizes take the nearest pixel, as in the authors' code, which puts
    the pooled feature last in the chain if the network has a layer for it.

    Args:
        width: the most channels in which stages are fused; they are the deepest stage's if that
            has fewer.
    """

    name: Literal["review_kd"] = "review_kd"
    width: int = Field(default=512, gt=0)
    on_features: ClassVar[bool] = True

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.ModuleList:  # noqa: ARG002
        shapes = [[maps(feature).shape for feature in pair] for pair in pairs]
        sizes = [student[2:] for student, _ in shapes]
        if any(deep.numel() > shallow.numel() for shallow, deep in pairwise(sizes)):
            raise ForeshotError(
                "review_kd: expected the student's layers from shallow to deep, found maps of "
                + ", then ".join(f"{height} x {width}" for height, width in sizes)
            )
        channels = [(student[1], teacher[1]) for student, teacher in shapes]
        width = min(self.width, channels[-1][0])
        return nn.ModuleList(
            Fusion(student, width, teacher, deepest=place == len(channels))
            for place, (student, teacher) in enumerate(channels, 1)
        )

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        assert isinstance(learned, nn.ModuleList)
        deeper, values = None, []
        for pair, fusion in zip(reversed(signals.pairs), reversed(learned), strict=True):
            student, teacher = map(maps, pair)
            reviewed, deeper = fusion(student, deeper, teacher.shape[2:])
            values.append(hcl(reviewed, teacher))
        return torch.stack(values).sum()


def _resized(feature: Tensor, size: Sequence[int]) -> Tensor:
    """Maps of another size, each pixel the nearest."""
    return feature if feature.shape[2:] == size else F.interpolate(feature, tuple(size))
