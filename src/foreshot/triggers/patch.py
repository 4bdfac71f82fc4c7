"""The square of BadNets."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.triggers.base import Colour, Overlay, Place, locate, paint


class Patch(Overlay):
    """An opaque square near a corner or in the center.

    T. Gu, B. Dolan-Gavitt, S. Garg: BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain, 2017, arXiv 1708.06733.

    Args:
        size: side in pixels, 1 or more.
        place: corner, or center.
        margin: pixels between the square and the nearest edges, 0 or more.
        pattern: `solid`, or `checker` of the colour (upper left pixel) and black.
        colour: red, green and blue, each 0 to 255; images without three channels take its luma.
    """

    name: Literal["patch"] = "patch"
    size: Annotated[int, Field(ge=1)] = 4
    place: Place = "bottom_right"
    margin: Annotated[int, Field(ge=0)] = 1
    pattern: Literal["solid", "checker"] = "solid"
    colour: Colour = (255, 255, 255)

    def ink(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        margin = 0 if self.place == "center" else self.margin
        self.check_side(shape, self.size + margin)
        rows, columns = locate(self.place, self.size, margin, shape)
        mask = torch.zeros(shape[1:], dtype=torch.bool)
        mask[rows, columns] = True
        levels = paint(self.colour, shape[0]).repeat(1, *shape[1:])
        if self.pattern == "checker":
            steps = torch.arange(self.size)
            levels[:, rows, columns] *= (steps[:, None] + steps + 1) % 2
        return mask, levels
