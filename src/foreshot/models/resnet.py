"""Residual networks for small images."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from foreshot.models.base import Architecture, convolution, kaiming


class ResNet(Architecture):
    """Residual network for small images, with three stages of basic blocks.

    K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition, CVPR 2016,
    section 4.2, with projection shortcuts. Depth 8 or 32 at width 4 are the `resnet8x4` and
    `resnet32x4` of Tian et al. (2020), Contrastive Representation Distillation, arXiv 1910.10699.

    Args:
        depth: layers with weights on the longest path: 6 n + 2 for n blocks a stage.
        width: multiplies the stages' 16, 32 and 64 channels, rounded to multiples of 8; above
            0 and up to 16. The stem has 8 x width channels, 16 at the least.
        stem_stride: stride of the first convolution; 2 costs a quarter of the time of 1.
    """

    name: Literal["resnet"] = "resnet"
    depth: Literal[8, 14, 20, 32, 56, 110] = 20
    width: Annotated[float, Field(gt=0, le=16)] = 1.0
    stem_stride: Literal[1, 2] = 1

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        self.check_side(shape, 4 * self.stem_stride)
        stem, *stages = [max(8, round(c * self.width / 8) * 8) for c in (8, 16, 32, 64)]
        widths = (max(16, stem), *stages)
        return ResidualNetwork(shape[0], widths, (self.depth - 2) // 6, self.stem_stride, classes)


class ResidualNetwork(nn.Module):
    """A stem, three stages of basic blocks, global average pooling and a linear classifier."""

    def __init__(
        self, channels: int, widths: tuple[int, ...], blocks: int, stem_stride: int, classes: int
    ) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = convolution(channels, stem, 3, stem_stride)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(stem, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.fc = nn.Linear(third, classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which projects where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        # Where there are fewer channels than a vector has floats, oneDNN writes past its memory in
        # the gradient of a strided 1 x 1 convolution (oneDNN issue 6035, torch 2.13 and 2.14).
        self.every = stride if inputs < 16 else 1
        if stride != 1 or inputs != outputs:
            projection = convolution(inputs, outputs, 1, stride // self.every)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x[:, :, :: self.every, :: self.every])
        return self.relu(out)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(1, blocks)))
