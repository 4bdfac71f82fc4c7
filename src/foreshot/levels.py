"""Stored images, in 8-bit levels, and the pixels in [0, 1] that networks take."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 levels -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(x: Tensor) -> Tensor:
    """Float in [0, 1] -> the nearest uint8 level."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
