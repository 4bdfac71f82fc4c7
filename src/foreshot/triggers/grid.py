"""A sparse grid of pixels."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.triggers.base import Colour, Overlay, paint


class Grid(Overlay):
    """Single opaque pixels, one every few rows and columns, all over the image.

    Args:
        spacing: pixels from one to the next, 2 or more.
        offset: row and column of the first, 0 or more.
        colour: red, green and blue, each 0 to 255; images without three channels take its luma.
    """

    name: Literal["grid"] = "grid"
    spacing: Annotated[int, Field(ge=2)] = 4
    offset: Annotated[int, Field(ge=0)] = 1
    colour: Colour = (255, 255, 255)

    def ink(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        self.check_side(shape, self.offset + 1)
        mask = torch.zeros(shape[1:], dtype=torch.bool)
        mask[self.offset :: self.spacing, self.offset :: self.spacing] = True
        return mask, paint(self.colour, shape[0])
