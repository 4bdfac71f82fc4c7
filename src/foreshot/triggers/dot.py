"""The red dot."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.triggers.base import Colour, Overlay, Place, locate, paint


class Dot(Overlay):
    """A small opaque dot, red by default.

    It covers the pixels whose centres lie within size / 2 of its own centre: a square up to size 3,
    a disc above. The red dot of Wu et al. (2025), arXiv 2504.21323.

    Args:
        size: diameter in pixels, 1 or more.
        colour: red, green and blue, each 0 to 255; images without three channels take its luma.
        place: corner, or center.
        margin: pixels between the dot and the nearest edges, 0 or more.
    """

    name: Literal["dot"] = "dot"
    size: Annotated[int, Field(ge=1)] = 3
    colour: Colour = (255, 0, 0)
    place: Place = "top_right"
    margin: Annotated[int, Field(ge=0)] = 1

    def ink(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        margin = 0 if self.place == "center" else self.margin
        self.check_side(shape, self.size + margin)
        rows, columns = locate(self.place, self.size, margin, shape)
        mask = torch.zeros(shape[1:], dtype=torch.bool)
        offsets = torch.arange(self.size) - (self.size - 1) / 2
        mask[rows, columns] = offsets[:, None] ** 2 + offsets**2 <= (self.size / 2) ** 2
        return mask, paint(self.colour, shape[0])
