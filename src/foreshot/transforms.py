"""Random changes that leave an image what it is, through which a gradient passes."""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foreshot.augment import padding

Transform = Literal[
    "none", "crop", "crop_flip", "shift", "noise", "blur", "median", "resize", "depth", "jpeg"
]


def transform(x: Tensor, kind: Transform, random: torch.Generator) -> Tensor:
    """All images changed alike, by a strength or a place that is drawn.

    - `none`: as they are;
    - `crop`: padded by an eighth of the side, by reflection, and cropped at random, as in training;
    - `crop_flip`: mirrored as well, every other time;
    - `shift`: by up to a pixel in each direction, edges repeated;
    - `noise`: Gaussian, sigma up to 8/255, another for each pixel and the same for each image;
    - `blur`: Gaussian, sigma 0.3 to 1 pixel;
    - `median`: of each pixel and its eight neighbours;
    - `resize`: scaled to 60 to 95 % and back, bilinearly;
    - `depth`: rounded to 3 to 5 bits a channel;
    - `jpeg`: of quality 50 to 90.

    Rounding has no gradient to speak of: that of `depth` and `jpeg` is that of the identity
    (backward pass differentiable approximation, Athalye et al., arXiv 1802.00420).

    Args:
        x: float (N, C, H, W) in [0, 1].
        kind: which change.
        random: a CPU generator.

    Returns:
        The same shape and dtype, in [0, 1].
    """
    return _CHANGES[kind](x, random)


def _none(x: Tensor, random: torch.Generator) -> Tensor:  # noqa: ARG001
    return x


def _crop(x: Tensor, random: torch.Generator) -> Tensor:
    height, width = x.shape[2:]
    down, across = padding(height, width)
    top = int(torch.randint(2 * down + 1, (), generator=random))
    left = int(torch.randint(2 * across + 1, (), generator=random))
    padded = F.pad(x, (across, across, down, down), "reflect")
    return padded[:, :, top : top + height, left : left + width]


def _crop_flip(x: Tensor, random: torch.Generator) -> Tensor:
    x = _crop(x, random)
    return x.flip(3) if torch.rand((), generator=random) < 0.5 else x


def _shift(x: Tensor, random: torch.Generator) -> Tensor:
    down, across = (torch.randint(3, (2,), generator=random) - 1).tolist()
    return shift(x, down, across)


def shift(x: Tensor, down: int, across: int) -> Tensor:
    """Moved by so many pixels, up and to the left where they are negative; edges are repeated."""
    sides = (max(across, 0), max(-across, 0), max(down, 0), max(-down, 0))
    top, left = max(-down, 0), max(-across, 0)
    moved = F.pad(x, sides, "replicate")
    return moved[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def _noise(x: Tensor, random: torch.Generator) -> Tensor:
    return noise(x, _between(0, 8 / 255, random), random)


def noise(x: Tensor, sigma: float, random: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation `sigma`, the same for each image."""
    return (x + sigma * torch.randn(x.shape[1:], generator=random).to(x)).clamp(0, 1)


def _blur(x: Tensor, random: torch.Generator) -> Tensor:
    return blur(x, _between(0.3, 1, random))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels, up to three pixels wide on each side."""
    from kornia.filters import gaussian_blur2d  # takes a second to import

    side = 2 * min(3, *(n - 1 for n in x.shape[2:])) + 1
    return gaussian_blur2d(x, (side, side), (sigma, sigma))


def _median(x: Tensor, random: torch.Generator) -> Tensor:  # noqa: ARG001
    return median(x)


def median(x: Tensor) -> Tensor:
    """The median of each pixel and its eight neighbours."""
    from kornia.filters import median_blur  # takes a second to import

    # Padded here: what lies beyond the edge differs between kornia's versions.
    return median_blur(F.pad(x, (1, 1, 1, 1), "reflect"), 3)[:, :, 1:-1, 1:-1]


def smooth(x: Tensor, weight: float, steps: int = 50) -> Tensor:
    """The image u of least |u - x|^2 / 2 + weight TV(u), each channel by itself.

    By Chambolle's projection (2004): u = x - weight div p, with p the field of vectors of length
    one or less that brings div p nearest to x / weight.

    Args:
        x: float (N, C, H, W).
        weight: of the total variation, the sum of the lengths of the gradients.
        steps: of the iteration.
    """
    down, across = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(steps):
        y, z = _gradient(_divergence(down, across) - x / weight)
        length = 1 + (y.square() + z.square()).sqrt() / 4
        down, across = (down + y / 4) / length, (across + z / 4) / length
    return x - weight * _divergence(down, across)


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the next pixel below and to the right, zero at the far edges."""
    return F.pad(x.diff(dim=2), (0, 0, 0, 1)), F.pad(x.diff(dim=3), (0, 1))


def _divergence(down: Tensor, across: Tensor) -> Tensor:
    """Minus the adjoint of `_gradient`, of what is zero at the far edges."""
    return down.diff(dim=2, prepend=torch.zeros_like(down[:, :, :1])) + across.diff(
        dim=3, prepend=torch.zeros_like(across[:, :, :, :1])
    )


def _resize(x: Tensor, random: torch.Generator) -> Tensor:
    share = _between(0.6, 0.95, random)
    size = [max(round(side * share), 1) for side in x.shape[2:]]
    small = F.interpolate(x, size, mode="bilinear", antialias=True)
    return F.interpolate(small, list(x.shape[2:]), mode="bilinear")


def _depth(x: Tensor, random: torch.Generator) -> Tensor:
    return depth(x, int(torch.randint(3, 6, (), generator=random)))


def depth(x: Tensor, bits: int) -> Tensor:
    """Rounded to `bits` a channel."""
    top = 2**bits - 1
    return _straight(x, (x.detach() * top).round() / top)


def _jpeg(x: Tensor, random: torch.Generator) -> Tensor:
    return jpeg(x, int(torch.randint(50, 91, (), generator=random)))


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Stored as JPEG by Pillow, and read again.

    Three channels are a picture in colour; of any other number each is a grey one.
    """
    levels = (x.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    grey = len(levels[0]) != 3
    pictures = levels.flatten(0, 1) if grey else levels.permute(0, 2, 3, 1)
    decoded = []
    for picture in pictures:
        stored = io.BytesIO()
        Image.fromarray(picture.numpy()).save(stored, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(stored))))
    again = torch.stack(decoded)
    again = again.view_as(levels) if grey else again.permute(0, 3, 1, 2)
    return _straight(x, again.to(x) / 255)


def _straight(x: Tensor, changed: Tensor) -> Tensor:
    """The changed images, with the gradient of the images themselves."""
    return x + (changed - x).detach()


def _between(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))


_CHANGES: dict[Transform, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": _none,
    "crop": _crop,
    "crop_flip": _crop_flip,
    "shift": _shift,
    "noise": _noise,
    "blur": _blur,
    "median": _median,
    "resize": _resize,
    "depth": _depth,
    "jpeg": _jpeg,
}
