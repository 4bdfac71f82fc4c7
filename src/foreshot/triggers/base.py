"""The family of triggers: the sign that an attacker puts on an image."""

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.errors import ForeshotError
from foreshot.family import Member
from foreshot.levels import to_float, to_uint8

PART = 512
"""Images that are stamped together."""

Level = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Level, Level, Level]
Place = Literal["top_left", "top_right", "bottom_left", "bottom_right", "center"]


class Trigger(Member):
    """A trigger draws itself on images of any size; it is the same for every image."""

    @abstractmethod
    def stamp(self, x: Tensor) -> Tensor:
        """Puts the trigger on images.

        Args:
            x: float (N, C, H, W) in [0, 1].

        Returns:
            The stamped images, same shape, dtype and device, in [0, 1]; differentiable in `x`.
            Stamping is monotone (a brighter image stays at least as bright at every pixel) and
            non-expansive: up to rounding, it never enlarges the L-inf distance of two images.

        Raises:
            ForeshotError: the trigger does not fit on images of this size.
        """

    def check_side(self, shape: tuple[int, int, int], smallest: int) -> None:
        """Refuses images with a side of fewer than `smallest` pixels."""
        _, height, width = shape
        if min(height, width) < smallest:
            wanted = f"images of at least {smallest} x {smallest} pixels"
            raise ForeshotError(
                f"trigger {self.title}: expected {wanted}, found {height} x {width}"
            )

    def opaque(self, shape: tuple[int, int, int]) -> Tensor:
        """Pixels that the trigger covers wholly: bool (C, H, W), True where the image is lost.

        Stamping is monotone, so a pixel is the same for all images if and only if it is the same
        for a black and a white one.
        """
        black = torch.zeros(shape, dtype=torch.float64)
        stamped = self.stamp(torch.stack([black, black + 1]))
        return stamped[0] == stamped[1]

    def draw(self, shape: tuple[int, int, int]) -> Tensor:
        """The trigger's portrait, on an image that shows it: uint8 (C, H, W)."""
        return stamp_uint8(self, torch.full((1, *shape), 128, dtype=torch.uint8))[0]


class Overlay(Trigger):
    """A trigger that replaces some pixels and leaves the others as they are."""

    @abstractmethod
    def ink(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Which pixels it covers, bool (H, W), and with what, levels 0 to 255, float (C, H, W)."""

    def stamp(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        mask, levels = self.ink((channels, height, width))
        return torch.where(mask.to(x.device), levels.to(x) / 255, x)


def paint(colour: Colour, channels: int) -> Tensor:
    """A colour on images of `channels` channels: levels, float (channels, 1, 1).

    Three channels take the colour as red, green and blue; any other number takes its Rec. 601
    luma, 0.299 R + 0.587 G + 0.114 B rounded to a level, in every channel.
    """
    levels = torch.tensor(colour, dtype=torch.float32)
    if channels != 3:
        luma = sum(w * level for w, level in zip((299, 587, 114), colour, strict=True)) / 1000
        levels = torch.full((channels,), float(round(luma)))
    return levels.reshape(-1, 1, 1)


def locate(
    place: Place, size: int, margin: int, shape: tuple[int, int, int]
) -> tuple[slice, slice]:
    """Rows and columns of a `size` x `size` square, `margin` pixels from the edges of its corner.

    In the center the margin is of no effect.
    """
    _, height, width = shape
    top, left = margin, margin
    if place.startswith("bottom"):
        top = height - margin - size
    if place.endswith("right"):
        left = width - margin - size
    if place == "center":
        top, left = (height - size) // 2, (width - size) // 2
    return slice(top, top + size), slice(left, left + size)


def stamp_uint8(trigger: Trigger, images: Tensor) -> Tensor:
    """Stamps stored images: uint8 (N, C, H, W) -> uint8, rounded to the nearest level."""
    # In parts, as in float a set takes twelve times as much memory.
    return torch.cat([to_uint8(trigger.stamp(to_float(part))) for part in images.split(PART)])


def unperturbed(trigger: Trigger, images: Tensor, stored: Tensor, stamps: bool | None) -> Tensor:
    """What stored images differ from by their perturbation alone, uint8 (N, C, H, W).

    Args:
        trigger: the attacker's.
        images: the originals, uint8 (N, C, H, W).
        stored: what was made of them.
        stamps: whether they carry the trigger; None for some opacity of it, which is then taken,
            pixel by pixel, to be the one that comes nearest.
    """
    if stamps is False:
        return images
    stamped = stamp_uint8(trigger, images)
    if stamps:
        return stamped
    return stored.clamp(images.minimum(stamped), images.maximum(stamped))
