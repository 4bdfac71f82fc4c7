"""MobileNetV2 for small images."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from foreshot.models.base import Architecture, active, convolution, kaiming


class MobileNetV2(Architecture):
    """Inverted residual blocks with depthwise convolutions and linear bottlenecks.

    M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen: MobileNetV2: Inverted Residuals and
    Linear Bottlenecks, CVPR 2018, arXiv 1801.04381; as used on small images: the second and third
    stages lose the strides that 224 pixels need. Width 0.5 is the `MobileNetV2` of Tian et
    al. (2020), arXiv 1910.10699.

    Args:
        width: multiplies every number of channels but the last, rounded down; 0.1 to 4.
        expansion: channels inside a block as a multiple of its input, 1 to 10.
    """

    name: Literal["mobilenet_v2"] = "mobilenet_v2"
    width: Annotated[float, Field(ge=0.1, le=4)] = 0.5
    expansion: Annotated[int, Field(ge=1, le=10)] = 6

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        self.check_side(shape, 16)
        return InvertedNetwork(shape[0], self.width, self.expansion, classes)


class InvertedNetwork(nn.Module):
    """A stem, four stages of inverted residual blocks, a wide last layer and a classifier."""

    def __init__(self, channels: int, width: float, expansion: int, classes: int) -> None:
        super().__init__()
        stem, c1, c2, c3, c4, c5, c6, c7 = (
            int(c * width) for c in (32, 16, 24, 32, 64, 96, 160, 320)
        )
        last = max(1280, int(1280 * width))
        self.stem = nn.Sequential(*active(channels, stem, 3, stride=2))
        self.layer1 = nn.Sequential(
            InvertedResidual(stem, c1, 1, expansion=1), *_blocks(c1, c2, 2, 1, expansion)
        )
        self.layer2 = nn.Sequential(*_blocks(c2, c3, 3, 2, expansion))
        self.layer3 = nn.Sequential(
            *_blocks(c3, c4, 4, 2, expansion), *_blocks(c4, c5, 3, 1, expansion)
        )
        self.layer4 = nn.Sequential(
            *_blocks(c5, c6, 3, 2, expansion), *_blocks(c6, c7, 1, 1, expansion)
        )
        self.head = nn.Sequential(*active(c7, last, 1))
        self.fc = nn.Linear(last, classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(self.head(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *active(inputs, hidden, 1),
            *active(hidden, hidden, 3, stride, groups=hidden),
            convolution(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def _blocks(inputs: int, outputs: int, number: int, stride: int, expansion: int) -> list[nn.Module]:
    first = InvertedResidual(inputs, outputs, stride, expansion)
    rest = (InvertedResidual(outputs, outputs, 1, expansion) for _ in range(1, number))
    return [first, *rest]
