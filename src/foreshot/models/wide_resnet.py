"""Wide residual networks for small images."""

from typing import Literal

from torch import Tensor, nn

from foreshot.models.base import Architecture, convolution, kaiming


class WideResNet(Architecture):
    """Wide residual network: few layers, many channels, activation before convolution.

    S. Zagoruyko, N. Komodakis: Wide Residual Networks, BMVC 2016, arXiv 1605.07146; without
    dropout. Depth 16 or 40 at width 2 are `wrn_16_2` and `wrn_40_2` of the distillation literature.

    Args:
        depth: layers with weights on the longest path: 6 n + 4 for n blocks a stage.
        width: multiplies the stages' 16, 32 and 64 channels.
    """

    name: Literal["wide_resnet"] = "wide_resnet"
    depth: Literal[16, 28, 40] = 16
    width: Literal[1, 2, 4, 10] = 2

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        self.check_side(shape, 4)
        return WideResidualNetwork(shape[0], self.width, (self.depth - 4) // 6, classes)


class WideResidualNetwork(nn.Module):
    """A stem, three stages of pre-activation blocks, global average pooling and a classifier."""

    def __init__(self, channels: int, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, 16, 3)
        self.layer1 = _stage(16, 16 * width, blocks, stride=1)
        self.layer2 = _stage(16 * width, 32 * width, blocks, stride=2)
        self.layer3 = _stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(64 * width, classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))


class PreActivationBlock(nn.Module):
    """Normalise, activate, convolve, twice; a shortcut that projects starts after the first."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.relu = nn.ReLU(inplace=True)
        self.projection = convolution(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(active)
        return shortcut + self.conv2(self.relu(self.bn2(self.conv1(active))))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(inputs, outputs, stride)
    rest = (PreActivationBlock(outputs, outputs, 1) for _ in range(1, blocks))
    return nn.Sequential(first, *rest)
