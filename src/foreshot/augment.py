"""Batched augmentation of uint8 images, on the device, from a generator of its own."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["none", "crop", "crop_flip", "strong", "strong_no_flip"]
STRONG: dict[Augmentation, Augmentation] = {"strong": "crop_flip", "strong_no_flip": "crop"}
"""The views that light and holes are added to."""


def number_of_views(kind: Augmentation, shape: tuple[int, int, int]) -> int | None:
    """How many views an image (C, H, W) has; None where they are not counted."""
    if kind in STRONG:
        return None
    height, width = _shifts(shape) if kind != "none" else (1, 1)
    return height * width * (2 if kind == "crop_flip" else 1)


def draw_views(
    count: int, shape: tuple[int, int, int], kind: Augmentation, generator: torch.Generator
) -> Tensor:
    """A random view of each image, by its number: which crop, and whether it is mirrored.

    Args:
        count: number of images.
        shape: (C, H, W) of one image.
        kind: which views.
        generator: a CPU generator.

    Returns:
        int64 (count,), in [0, number_of_views) where these are counted.
    """
    counted = number_of_views(STRONG.get(kind, kind), shape)
    assert counted is not None
    return torch.randint(0, counted, (count,), generator=generator)


def augment(
    images: Tensor, kind: Augmentation, generator: torch.Generator, views: Tensor | None = None
) -> Tensor:
    """One random view of each image.

    `crop` pads by an eighth of the side (4 pixels of 32; reflected) and crops at random;
    `crop_flip` also mirrors half of the images; `strong` also scales brightness and contrast by
    up to 40 % and covers a random square of half the side with grey (Cutout, DeVries & Taylor,
    arXiv 1708.04552); `strong_no_flip` does the same and mirrors none, as no traffic sign may be.

    Args:
        images: uint8 (N, C, H, W).
        kind: which views.
        generator: a CPU generator.
        views: what `draw_views` gave, int64 (N,); drawn here if None.

    Returns:
        uint8 (N, C, H, W).
    """
    if kind == "none":
        return images
    channels, height, width = images.shape[1:]
    shape = channels, height, width
    if views is None:
        views = draw_views(len(images), shape, kind, generator)
    views = views.to(images.device)
    plain = STRONG.get(kind, kind)
    if plain == "crop":
        cropped = _crop(images, views, shape)
    else:
        cropped = _crop(images, views // 2, shape)
        cropped = torch.where((views % 2 == 1)[:, None, None, None], cropped.flip(3), cropped)
    return cropped if kind == plain else _cutout(_light(cropped, generator), generator)


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """One number in [0, 1) an image, shaped (N, 1, 1, 1)."""
    return torch.rand((len(images), 1, 1, 1), generator=generator).to(images.device)


def _shifts(shape: tuple[int, int, int]) -> tuple[int, int]:
    """By how many ways a crop may lie, down and across."""
    _, height, width = shape
    down, across = padding(height, width)
    return 2 * down + 1, 2 * across + 1


def padding(height: int, width: int) -> tuple[int, int]:
    """By how much images are padded before a crop: an eighth; none of one pixel is reflected."""
    down, across = (min(max(side // 8, 1), side - 1) for side in (height, width))
    return down, across


def _crop(images: Tensor, places: Tensor, shape: tuple[int, int, int]) -> Tensor:
    _, height, width = shape
    down, across = _shifts(shape)
    # Reflection is not implemented for uint8 tensors; an index does it without a float copy.
    rows = _reflected(height, down // 2).to(images.device)
    columns = _reflected(width, across // 2).to(images.device)
    y = rows[(places // across)[:, None] + torch.arange(height, device=images.device)]
    x = columns[(places % across)[:, None] + torch.arange(width, device=images.device)]
    image = torch.arange(len(images), device=images.device)
    picked = images.permute(0, 2, 3, 1)[image[:, None, None], y[:, :, None], x[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _reflected(length: int, pad: int) -> Tensor:
    return F.pad(torch.arange(length).float()[None, None], (pad, pad), "reflect")[0, 0].long()


def _light(images: Tensor, generator: torch.Generator) -> Tensor:
    brightness = 0.6 + 0.8 * _uniform(images, generator)
    contrast = 0.6 + 0.8 * _uniform(images, generator)
    x = images.float() * brightness
    mean = x.mean((1, 2, 3), keepdim=True)
    return ((x - mean) * contrast + mean).round().clamp(0, 255).to(torch.uint8)


def _cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    x = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    centre_y = _uniform(images, generator) * height
    centre_x = _uniform(images, generator) * width
    hole = ((y - centre_y).abs() <= height / 4) & ((x - centre_x).abs() <= width / 4)
    return torch.where(hole, torch.full_like(images, 128), images)
