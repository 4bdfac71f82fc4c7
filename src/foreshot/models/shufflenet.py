"""ShuffleNetV2 for small images."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foreshot.models.base import Architecture, active, convolution, kaiming

CHANNELS = {
    "x0.5": (48, 96, 192, 1024),
    "x1": (116, 232, 464, 1024),
    "x1.5": (176, 352, 704, 1024),
    "x2": (244, 488, 976, 2048),
}
"""Channels of the three stages and of the last convolution (table 5 of the paper)."""


class ShuffleNetV2(Architecture):
    """Half of the channels pass each block untouched, then the halves are shuffled.

    N. Ma, X. Zhang, H.-T. Zheng, J. Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN
    Architecture Design, ECCV 2018, arXiv 1807.11164; as used on small images, with a 1 x 1 stem
    and no pooling before the first stage. Size x1 is the `ShuffleV2` of Tian et al. (2020),
    arXiv 1910.10699.

    Args:
        size: the paper's multiple of the channels.
    """

    name: Literal["shufflenet_v2"] = "shufflenet_v2"
    size: Literal["x0.5", "x1", "x1.5", "x2"] = "x1"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        self.check_side(shape, 8)
        return ShuffledNetwork(shape[0], CHANNELS[self.size], classes)


class ShuffledNetwork(nn.Module):
    """A stem, three stages of 4, 8 and 4 units, a last convolution and a classifier."""

    def __init__(self, channels: int, widths: tuple[int, int, int, int], classes: int) -> None:
        super().__init__()
        first, second, third, last = widths
        self.stem = nn.Sequential(*active(channels, 24, 1))
        self.layer1 = _stage(24, first, 4)
        self.layer2 = _stage(first, second, 8)
        self.layer3 = _stage(second, third, 4)
        self.head = nn.Sequential(*active(third, last, 1))
        self.fc = nn.Linear(last, classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.head(x).mean((2, 3)))


class Unit(nn.Module):
    """Half of the channels pass a bottleneck, the other half passes by."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _bottleneck(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        passing, filtered = x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat([passing, self.branch(filtered)], 1), 2)


class DownUnit(nn.Module):
    """Both halves of the output see the whole input, at half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.shortcut = nn.Sequential(*_depthwise(inputs, 2), *active(inputs, half, 1))
        self.branch = _bottleneck(inputs, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat([self.shortcut(x), self.branch(x)], 1), 2)


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [convolution(channels, channels, 3, stride, channels), nn.BatchNorm2d(channels)]


def _bottleneck(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *active(inputs, outputs, 1), *_depthwise(outputs, stride), *active(outputs, outputs, 1)
    )


def _stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(inputs, outputs), *(Unit(outputs) for _ in range(1, units)))
