"""The imperceptible warping of WaNet."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from foreshot.seeding import generator
from foreshot.triggers.base import Trigger, stamp_uint8


class Warp(Trigger):
    """A smooth, random elastic warp of the whole image.

    A control grid of displacements, uniform in [-1, 1] and divided by their mean size, is enlarged
    to the image (bicubic), scaled by strength / side and sampled (bilinear, edges repeated).
    T. A. Nguyen, A. T. Tran: WaNet - Imperceptible Warping-based Backdoor Attack, ICLR 2021,
    arXiv 2102.10369.

    Args:
        grid: k, control points a side, 2 or more, at most the image's shorter side.
        strength: s, above 0 and up to 10; control points move by about s / 2 pixels.
        seed: seed of the control points.
    """

    name: Literal["warp"] = "warp"
    grid: Annotated[int, Field(ge=2)] = 4
    strength: Annotated[float, Field(gt=0, le=10)] = 0.5
    seed: int = 0

    def field(self, height: int, width: int) -> Tensor:
        """Where each pixel looks: float64 (H, W, 2), (x, y) from -1 to 1 between outer pixels."""
        noise = generator(self.seed, "warp")
        control = torch.rand(1, 2, self.grid, self.grid, generator=noise, dtype=torch.float64)
        control = 2 * control - 1
        control = control / control.abs().mean()
        moves = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)
        moves = moves[0].permute(1, 2, 0) * self.strength / torch.tensor([width, height])
        rows, columns = (
            torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width)
        )
        here = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        return (here + moves).clamp(-1, 1)

    def stamp(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        self.check_side((channels, height, width), self.grid)
        # Positions in half precision would be off by whole levels.
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        field = self.field(height, width).to(precise).expand(len(x), -1, -1, -1)
        warped = F.grid_sample(precise, field, padding_mode="border", align_corners=True)
        return warped.clamp(0, 1).to(x.dtype)  # by rounding, weights may sum to just above 1

    def draw(self, shape: tuple[int, int, int]) -> Tensor:
        """A checkerboard, stamped: a plain image would not show a warp."""
        channels, height, width = shape
        board = (torch.arange(height)[:, None] // 4 + torch.arange(width) // 4) % 2 * 255
        return stamp_uint8(self, board.to(torch.uint8).expand(1, channels, -1, -1))[0]
