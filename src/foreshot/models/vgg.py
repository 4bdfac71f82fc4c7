"""VGG networks for small images."""

from typing import Literal

from torch import Tensor, nn

from foreshot.models.base import Architecture, kaiming

BLOCKS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions in each of the five stages, by depth."""


class Vgg(Architecture):
    """Plain stack of 3 x 3 convolutions with batch normalisation and one linear layer.

    K. Simonyan, A. Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition,
    ICLR 2015, arXiv 1409.1556; as used on small images, with batch normalisation and global average
    pooling in place of the hidden linear layers. Every stage but the first halves its input by max
    pooling, unless that leaves fewer than 3 pixels a side: 32 pixels end as 4, and 28 as 3.

    Args:
        depth: layers with weights in the paper's networks, which have two more linear layers.
    """

    name: Literal["vgg"] = "vgg"
    depth: Literal[8, 11, 13, 16, 19] = 8

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        self.check_side(shape, 6)
        return PlainNetwork(shape, BLOCKS[self.depth], classes)


class PlainNetwork(nn.Module):
    """Five stages of convolutions, global average pooling and a linear classifier."""

    def __init__(self, shape: tuple[int, int, int], blocks: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        side = min(height, width)
        for stage, (outputs, depth) in enumerate(
            zip((64, 128, 256, 512, 512), blocks, strict=True), start=1
        ):
            # A stage pools first, so that its output is what the next stage has not yet halved.
            pools = stage > 1 and side >= 6
            side = side // 2 if pools else side
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if pools else []
            for _ in range(depth):
                layers += [
                    nn.Conv2d(channels, outputs, 3, padding=1),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
                channels = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        *stages, classifier = self.children()
        for stage in stages:
            x = stage(x)
        return classifier(x.mean((2, 3)))
