"""Synthetic traffic signs, drawn by formula: every image is a function of its index."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.sign_atlas import BLURS, CLASSES, REACH, TEXELS, atlas
from foreshot.seeding import generator

PARAMETERS = 128
"""Hashes of an image below this number are its parameters, those from it on its noise."""


def _mix(h: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) on int64 that wraps."""
    h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return h ^ ((h >> 31) & 0x1FFFFFFFF)


def render(split: str, indices: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the images of a split at `indices`, any of them, in any order and number.

    An image is the same whatever it is drawn with: a hash of (seed, split, index) supplies its
    randomness, and each step is an integer operation or one IEEE operation on one element. Matrix
    products, convolutions and transcendental functions, whose last bits depend on the shape of the
    batch and on the processor, are kept out. It runs on one thread; slices may run in parallel
    processes.

    Args:
        split: name of the split, part of the hash.
        indices: int64 (n,), 0 or more. Each run of 43 indices from a multiple of 43 on holds every
            class once, in an order of its own.
        size: height and width in pixels.
        seed: part of the hash.

    Returns:
        Images, uint8 (n, 3, size, size), and labels, int64 (n,).
    """
    key = torch.randint(2**62, (), generator=generator(seed, "signs", split))
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    labels = torch.empty(len(indices), dtype=torch.int64)
    step = max(1, 2**17 // size**2)  # the planes of so many images stay in the processor's cache
    threads = torch.get_num_threads()
    # Thousands of short operations: on a busy machine threads would mostly wait for one another.
    torch.set_num_threads(1)
    try:
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            labels[part] = _labels(key, indices[part])
            images[part] = _draw(key, indices[part], labels[part], size)
    finally:
        torch.set_num_threads(threads)
    return images, labels


def _labels(key: Tensor, indices: Tensor) -> Tensor:
    # 43 is prime, so that place -> a * place + b with a != 0 is a permutation of the classes.
    block, place = indices // len(CLASSES), indices % len(CLASSES)
    h = _mix(_mix(~key + block))
    a, b = 1 + (h & 0xFFFFFF) % (len(CLASSES) - 1), ((h >> 24) & 0xFFFFFF) % len(CLASSES)
    return (a * place + b) % len(CLASSES)


class _Draws:
    """The random parameters of a batch of images, drawn one after the other."""

    def __init__(self, identity: Tensor) -> None:
        high = _mix(identity[:, None] + torch.arange(1, PARAMETERS)) >> 40 & 0xFFFFFF
        self._columns = iter((high.float() / 2**24).T)

    def between(self, low: float, high: float, channels: int = 1) -> Tensor:
        """Uniform in [low, high): (n, channels, 1, 1)."""
        columns = torch.stack([next(self._columns) for _ in range(channels)], 1)
        return (low + (high - low) * columns)[:, :, None, None]

    def strip(self, x: Tensor, y: Tensor, low: float, high: float, sharp: float) -> Tensor:
        """One within a band across the image, zero beyond it; its half-width is in [low, high)."""
        across = self.between(-1, 1) * x + self.between(-1, 1) * y + self.between(-0.8, 0.8)
        return ((self.between(low, high) - across.abs()) * sharp).clamp(0, 1)


def _draw(key: Tensor, indices: Tensor, labels: Tensor, size: int) -> Tensor:
    identity = _mix(_mix(key + indices))
    draws = _Draws(identity)
    steps = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = steps[None, None, None, :], steps[None, None, :, None]

    sign, coverage = _sign(draws, x, y, labels).split([3, 1], 1)
    picture = sign + _scene(draws, x, y) * (1 - coverage / 255)
    cover = draws.strip(x, y, -0.12, 0.12, 8)  # a twig or a post in front of every other sign
    picture += cover * (draws.between(20, 150, 3) - picture)

    # The light: exposure and its slope, a shadow, haze, a colour cast.
    slope = 1 + draws.between(-0.3, 0.3) * x + draws.between(-0.3, 0.3) * y
    shadow = 1 - draws.strip(x, y, -0.6, 0.8, 3) * draws.between(0, 0.6)
    light = draws.between(0.35, 1.2) * slope * shadow
    haze, cast = draws.between(0, 0.5), draws.between(0.82, 1.12, 3)
    picture = (picture * (1 - haze) + haze * 140) * light * cast
    picture += _noise(identity, size) * draws.between(0.005, 0.02)
    return (picture + 0.5).clamp(0, 255).to(torch.uint8)


def _sign(draws: _Draws, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """The signs seen askew: colour times coverage, and coverage, of 255; float32 (n, 4, H, W)."""
    # With t = tan(angle / 2), cosine and sine are rational.
    t = draws.between(-0.16, 0.16)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    scale, aspect = draws.between(0.58, 0.9), draws.between(0.85, 1.15)
    shear = draws.between(-0.12, 0.12)
    dx, dy = x - draws.between(-0.16, 0.16), y - draws.between(-0.16, 0.16)
    tilt = 1 + draws.between(-0.2, 0.2) * dx + draws.between(-0.2, 0.2) * dy
    depth = tilt * scale * (2 * REACH / TEXELS)
    u = ((cosine - shear * sine) * dx + (sine + shear * cosine) * dy) / depth
    v = ((cosine * dy - sine * dx) * aspect) / depth
    column, row = ((q + TEXELS / 2).clamp(0, TEXELS - 1).to(torch.int32) for q in (u, v))
    blur = draws.between(0, len(BLURS)).long()
    sheet = labels[:, None, None, None] * len(BLURS) + blur
    texels = atlas().take(sheet * TEXELS**2 + row * TEXELS + column)
    return texels[:, 0, :, :, None].view(torch.uint8).movedim(-1, 1).float()


def _scene(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    """Smooth colours on a lattice, and a strip such as a pole, a wall or the horizon."""
    knots = 4
    base = draws.between(40, 190) + draws.between(-35, 35, 3)
    lattice = base + draws.between(-60, 60, 3 * knots * knots).view(-1, 3, knots, knots)
    place = (x.flatten() + 1) / 2 * (knots - 1)
    cell = place.long()
    weight = place - cell
    weight = weight * weight * (3 - 2 * weight)
    near, rise = (q.index_select(2, cell) for q in (lattice, lattice.diff(dim=2)))
    rows = near + rise * weight[:, None]
    near, rise = (q.index_select(3, cell) for q in (rows, rows.diff(dim=3)))
    return near + rise * weight + draws.strip(x, y, 0.05, 0.5, 4) * draws.between(-90, 90, 3)


def _noise(identity: Tensor, size: int) -> Tensor:
    """Integers with a triangular distribution on [-255, 255], float32 (n, 3, size, size)."""
    pixels = torch.arange(PARAMETERS, PARAMETERS + size * size).view(size, size, 1)
    h = _mix(identity[:, None, None, None] + pixels)
    pairs = (h & 0xFF00FF00FF00FF) + (h >> 8 & 0xFF00FF00FF00FF)  # four sums of two bytes each
    return pairs.view(torch.int16)[..., :3].movedim(-1, 1).float() - 255


class Signs(Dataset):
    """Synthetic traffic signs: 43 classes after the catalogue of GTSRB, drawn by formula, no photo.

    The names of the classes and the rough look of the signs follow the German Traffic Sign
    Recognition Benchmark (Stallkamp et al., Neural Networks 2012); the images are not GTSRB's, nor
    are numbers measured on one those of the other. Rotation, perspective, blur, clutter, an
    occluding strip, shadow, haze, colour cast and noise vary from image to image. Image i of a
    split depends on (seed, split, i) alone: a smaller set is the beginning of a larger one. Some
    signs are mirror images of others: a training that flips images confuses them.

    Args:
        train: number of training images; classes are balanced to within one image.
        test: number of test images.
        size: height and width in pixels, 16 to 128.
        seed: picks another set of images; the classes look the same.
    """

    name: Literal["signs"] = "signs"
    train: int = Field(default=8000, ge=1)
    test: int = Field(default=2000, ge=1)
    size: int = Field(default=32, ge=16, le=128)
    seed: int = 0

    generated: ClassVar[bool] = True

    def load(self, cache: Path) -> Splits:  # noqa: ARG002 - nothing is read
        train, test = (
            ImageSet(*render(split, torch.arange(count), self.size, self.seed), CLASSES)
            for split, count in (("train", self.train), ("test", self.test))
        )
        return Splits(train, test)
