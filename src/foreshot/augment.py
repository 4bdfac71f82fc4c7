"""Batched augmentation of uint8 images, on the device, from a generator of its own."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["none", "crop", "crop_flip", "strong"]


def augment(images: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """One random view of each image.

    `crop` pads by an eighth of the side (4 pixels of 32; reflected) and crops at random;
    `crop_flip` also mirrors half of the images; `strong` also scales brightness and contrast by
    up to 40 % and covers a random square of half the side with grey (Cutout, DeVries & Taylor,
    arXiv 1708.04552).

    Args:
        images: uint8 (N, C, H, W).
        kind: which views.
        generator: a CPU generator.

    Returns:
        uint8 (N, C, H, W).
    """
    if kind == "none":
        return images
    views = _crop(images, generator)
    if kind == "crop":
        return views
    flip = _uniform(images, generator) < 0.5
    views = torch.where(flip, views.flip(3), views)
    return views if kind == "crop_flip" else _cutout(_light(views, generator), generator)


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """One number in [0, 1) an image, shaped (N, 1, 1, 1)."""
    return torch.rand((len(images), 1, 1, 1), generator=generator).to(images.device)


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    n, _, height, width = images.shape
    pad_y, pad_x = max(height // 8, 1), max(width // 8, 1)
    # Reflection is not implemented for uint8 tensors; an index does it without a float copy.
    rows = _reflected(height, pad_y).to(images.device)
    columns = _reflected(width, pad_x).to(images.device)
    top = torch.randint(0, 2 * pad_y + 1, (n, 1), generator=generator).to(images.device)
    left = torch.randint(0, 2 * pad_x + 1, (n, 1), generator=generator).to(images.device)
    y = rows[top + torch.arange(height, device=images.device)]
    x = columns[left + torch.arange(width, device=images.device)]
    image = torch.arange(n, device=images.device)
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
