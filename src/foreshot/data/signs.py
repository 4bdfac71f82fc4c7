"""Synthetic traffic signs, drawn by formula: every image is a function of its index."""

from functools import cache
from itertools import pairwise
from math import cos, pi, sin
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.seeding import generator

Colour = tuple[int, int, int]
BLACK, GREY, WHITE = (25, 25, 28), (90, 90, 92), (235, 235, 230)
RED, BLUE, YELLOW, GREEN = (190, 28, 40), (25, 75, 170), (240, 190, 30), (20, 140, 70)

TEXELS, REACH = 128, 1.25
"""A sign is kept as TEXELS x TEXELS texels that span [-REACH, REACH]; its own radius is 1."""

BLURS = (5, 9, 13, 15)
"""Widths in texels of the box filter that is run twice over a sign; some four are a pixel."""


PARAMETERS = 128
"""Hashes of an image below this number are its parameters, those from it on its noise."""


class Stroke(NamedTuple):
    """A thick line through (x0, y0, x1, y1, ...), in tenths of the glyph's half-width, y down."""

    points: tuple[float, ...]
    width: float = 2.4
    ink: Colour | None = None


Glyph = tuple[Stroke, ...]

DIGITS: dict[str, tuple[float, ...]] = {
    "0": (-3, -4, -1, -7, 1, -7, 3, -4, 3, 4, 1, 7, -1, 7, -3, 4, -3, -4),
    "1": (-2, -4, 1, -7, 1, 7),
    "2": (-3, -4, -1, -7, 2, -7, 3, -4, 3, -2, -3, 7, 3, 7),
    "3": (-3, -6, 0, -7, 3, -5, 3, -2, 0, 0, 3, 2, 3, 5, 0, 7, -3, 6),
    "5": (3, -7, -3, -7, -3, -1, 1, -2, 3, 1, 3, 4, 1, 7, -3, 6),
    "6": (2, -7, -2, -4, -3, 1, -3, 4, -1, 7, 1, 7, 3, 5, 3, 2, 1, 0, -2, 1),
    "7": (-3, -7, 3, -7, -1, 7),
    "8": (0, -1, -3, -3, -3, -5, 0, -7, 3, -5, 3, -3, 0, -1, -3, 2, -3, 5, 0, 7, 3, 5, 3, 2, 0, -1),
}


def _number(text: str, ink: Colour | None = None) -> Glyph:
    pitch, squeeze = (10, 1.0) if len(text) == 2 else (7, 0.8)
    strokes = []
    for place, digit in enumerate(text):
        left = pitch * (place - (len(text) - 1) / 2)
        xs, ys = DIGITS[digit][::2], DIGITS[digit][1::2]
        points = tuple(v for x, y in zip(xs, ys, strict=True) for v in (left + squeeze * x, y))
        strokes.append(Stroke(points, 2.4 * squeeze, ink))
    return tuple(strokes)


def _ring(x: float, y: float, radius: float, width: float = 2.0) -> Stroke:
    angles = [pi * k / 6 for k in range(13)]
    return Stroke(
        tuple(v for a in angles for v in (x + radius * cos(a), y + radius * sin(a))), width
    )


def _mirror(glyph: Glyph) -> Glyph:
    def flip(points: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(-v if k % 2 == 0 else v for k, v in enumerate(points))

    return tuple(stroke._replace(points=flip(stroke.points)) for stroke in glyph)


def _car(x: float, ink: Colour) -> Glyph:
    return Stroke((x - 3, 2, x + 3, 2), 4, ink), Stroke((x - 1.2, -1.5, x + 1.2, -1.5), 3, ink)


def _lorry(x: float, ink: Colour) -> Glyph:
    return Stroke((x - 2, -3.5, x - 2, 3, x + 3, 3), 4.5, ink), Stroke(
        (x + 2.5, 0, x + 3, 3), 3, ink
    )


LORRY = (Stroke((-6, -3, 1, -3), 7), Stroke((-7, 3, 7, 3), 3), Stroke((6, -1, 7, 3), 4))
SLASH = Stroke((-11, 11, 11, -11), 3, BLACK)
TURN = (Stroke((-4, 8, -4, -1, 5, -1), 3), Stroke((1, -6, 6, -1, 1, 4), 3))
AHEAD = (Stroke((0, 9, 0, -7), 3), Stroke((-5, -3, 0, -8, 5, -3), 3))
AHEAD_OR_TURN = (
    Stroke((-3, 9, -3, -7), 2.6),
    Stroke((-7, -4, -3, -8, 1, -4), 2.6),
    Stroke((-3, 5, 6, 1), 2.6),
    Stroke((3, -2, 7, 1, 4, 5), 2.6),
)
KEEP = (Stroke((-6, -6, 6, 6), 3), Stroke((-1, 7, 7, 7, 7, -1), 3))
CURVE = (Stroke((-3, 8, -3, 0, 4, -6), 3), Stroke((-1, -8, 6, -8, 6, -1), 2.4))

SIGNS: dict[str, tuple[str, Glyph]] = {
    "speed limit 20": ("limit", _number("20")),
    "speed limit 30": ("limit", _number("30")),
    "speed limit 50": ("limit", _number("50")),
    "speed limit 60": ("limit", _number("60")),
    "speed limit 70": ("limit", _number("70")),
    "speed limit 80": ("limit", _number("80")),
    "end of speed limit 80": ("end", (*_number("80", GREY), SLASH)),
    "speed limit 100": ("limit", _number("100")),
    "speed limit 120": ("limit", _number("120")),
    "no overtaking": ("limit", (*_car(-5, RED), *_car(5, BLACK))),
    "no overtaking by lorries": ("limit", (*_lorry(-5, RED), *_car(5, BLACK))),
    "priority at the next crossing": (
        "warning",
        (Stroke((0, 9, 0, -9), 3.4), Stroke((-7, 1, 7, 1), 2.2), Stroke((-2, -5, 2, -5), 3)),
    ),
    "priority road": ("diamond", ()),
    "give way": ("yield", ()),
    "stop": (
        "stop",
        (
            Stroke((-8, -3, -11, -3, -11, 0, -8, 0, -8, 4, -11, 4), 1.6),
            Stroke((-5.5, -3, -1.5, -3, -3.5, -3, -3.5, 4), 1.6),
            Stroke((1, -3, 4, -3, 4, 4, 1, 4, 1, -3), 1.6),
            Stroke((7, 4, 7, -3, 10.5, -3, 10.5, 0.5, 7, 0.5), 1.6),
        ),
    ),
    "no vehicles": ("limit", ()),
    "no lorries": ("limit", LORRY),
    "no entry": ("forbidden", (Stroke((-9, 0, 9, 0), 5),)),
    "danger": ("warning", (Stroke((0, -9, 0, 2), 3.6), Stroke((0, 8), 4))),
    "curve to the left": ("warning", _mirror(CURVE)),
    "curve to the right": ("warning", CURVE),
    "double curve": ("warning", (Stroke((-4, 9, -4, 4, 4, 0, 4, -3, -3, -8), 3),)),
    "bumpy road": (
        "warning",
        (Stroke((-10, 7, 10, 7), 2.4), Stroke((-5, 4), 7), Stroke((5, 4), 7)),
    ),
    "slippery road": (
        "warning",
        (
            Stroke((-3, -5, 3, -5), 5),
            Stroke((-6, 9, -2, 5, -6, 2), 2),
            Stroke((3, 9, 7, 5, 3, 2), 2),
        ),
    ),
    "road narrows on the right": (
        "warning",
        (Stroke((-4, 9, -4, -8), 2.6), Stroke((6, 9, 6, 3, 2, -1, 2, -8), 2.6)),
    ),
    "road works": (
        "warning",
        (
            Stroke((-2, -7), 4.5),
            Stroke((-2, -3, -3, 3, -7, 9), 2.6),
            Stroke((-3, 3, 1, 9), 2.4),
            Stroke((-2, -2, 7, 6), 2),
            Stroke((6, 9, 10, 9), 3),
        ),
    ),
    "traffic signals": (
        "warning",
        (Stroke((0, -7), 5.5, RED), Stroke((0, 0), 5.5, YELLOW), Stroke((0, 7), 5.5, GREEN)),
    ),
    "pedestrians": (
        "warning",
        (
            Stroke((0, -8), 4.5),
            Stroke((0, -4, 0, 2, -4, 9), 2.8),
            Stroke((0, 2, 4, 9), 2.8),
            Stroke((-5, 1, 0, -4, 5, 1), 2),
        ),
    ),
    "children": (
        "warning",
        (
            Stroke((-4, -5), 4),
            Stroke((-4, -2, -4, 3, -7, 9), 2.4),
            Stroke((-4, 3, -2, 9), 2.4),
            Stroke((5, -2), 4),
            Stroke((5, 1, 5, 4, 3, 9), 2.4),
            Stroke((5, 4, 8, 9), 2.4),
            Stroke((-4, -1, 5, 2), 1.8),
        ),
    ),
    "bicycles": (
        "warning",
        (
            _ring(-6, 4, 4),
            _ring(6, 4, 4),
            Stroke((-6, 4, -2, -3, 4, -3, 0, 4, -6, 4), 1.8),
            Stroke((6, 4, 3, -7), 1.8),
        ),
    ),
    "ice or snow": (
        "warning",
        (
            Stroke((0, -9, 0, 9), 2),
            Stroke((-7.8, -4.5, 7.8, 4.5), 2),
            Stroke((-7.8, 4.5, 7.8, -4.5), 2),
        ),
    ),
    "wild animals": (
        "warning",
        (
            Stroke((-6, 1, 3, -1), 4.4),
            Stroke((3, -1, 6, -6), 3),
            Stroke((-6, 1, -7, 9), 2),
            Stroke((3, 0, 5, 9), 2),
            Stroke((5, -6, 3, -10), 1.6),
            Stroke((6, -6, 9, -5), 2),
        ),
    ),
    "end of all limits": ("end", (SLASH,)),
    "turn right": ("order", TURN),
    "turn left": ("order", _mirror(TURN)),
    "ahead only": ("order", AHEAD),
    "ahead or right": ("order", AHEAD_OR_TURN),
    "ahead or left": ("order", _mirror(AHEAD_OR_TURN)),
    "keep right": ("order", KEEP),
    "keep left": ("order", _mirror(KEEP)),
    "roundabout": (
        "order",
        (
            Stroke((-2, -7, 5, -5, 7, 0), 2.6),
            Stroke((6, 4, 1, 8, -4, 6), 2.6),
            Stroke((-7, 3, -7, -3, -4, -5.5), 2.6),
            Stroke((10, -2, 7, 2, 4, -2), 2),
            Stroke((-2, 3, -6, 5.5, -3, 9), 2),
            Stroke((-8, -7, -3, -6, -5, -1), 2),
        ),
    ),
    "end of no overtaking": ("end", (*_car(-5, GREY), *_car(5, GREY), SLASH)),
    "end of no overtaking by lorries": ("end", (*_lorry(-5, GREY), *_car(5, GREY), SLASH)),
}
CLASSES = tuple(SIGNS)


class Plate(NamedTuple):
    """A regular polygon (a disc if `sides` is 0) with a rim; `turn` of a circle rotates it."""

    sides: int
    turn: float
    centre: float
    inradius: float
    rim: Colour
    rim_width: float
    field: Colour
    ink: Colour
    glyph: float


PLATES = {
    "limit": Plate(0, 0, 0, 1, RED, 0.2, WHITE, BLACK, 0.066),
    "end": Plate(0, 0, 0, 1, GREY, 0.06, WHITE, BLACK, 0.066),
    "order": Plate(0, 0, 0, 1, WHITE, 0.05, BLUE, WHITE, 0.072),
    "forbidden": Plate(0, 0, 0, 1, RED, 0, RED, WHITE, 0.07),
    "warning": Plate(3, 0.25, 0.2, 0.61, RED, 0.12, WHITE, BLACK, 0.053),
    "yield": Plate(3, 0.75, -0.2, 0.61, RED, 0.18, WHITE, BLACK, 0.05),
    "diamond": Plate(4, 0.125, 0, 0.76, WHITE, 0.17, YELLOW, BLACK, 0.07),
    "stop": Plate(8, 0, 0, 0.95, WHITE, 0.06, RED, WHITE, 0.072),
}


@cache
def _atlas() -> Tensor:
    """Every sign at every blur, int32 (classes * blurs * TEXELS * TEXELS,).

    A texel packs red, green, blue (all three times coverage) and coverage, eight bits each.
    """
    steps = ((torch.arange(TEXELS, dtype=torch.float64) + 0.5) * 2 / TEXELS - 1) * REACH
    y, x = steps[:, None], steps[None, :]

    def plate(p: Plate, inset: float) -> Tensor:
        if p.sides == 0:
            return x * x + y * y < (p.inradius - inset) ** 2
        angles = [2 * pi * (p.turn + k / p.sides) for k in range(p.sides)]
        faces = [x * cos(a) + (y - p.centre) * sin(a) < p.inradius - inset for a in angles]
        return torch.stack(faces).all(0)

    def line(stroke: Stroke, p: Plate) -> Tensor:
        values = [v * p.glyph for v in stroke.points]
        corners = list(zip(values[::2], [v + p.centre for v in values[1::2]], strict=True))
        inside = torch.zeros(TEXELS, TEXELS, dtype=torch.bool)
        for (x0, y0), (x1, y1) in pairwise(corners if len(corners) > 1 else corners * 2):
            dx, dy = x1 - x0, y1 - y0
            along = (((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-9)).clamp(0, 1)
            square = (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2
            inside |= square < (stroke.width * p.glyph / 2) ** 2
        return inside

    signs = torch.zeros(len(SIGNS), 4, TEXELS, TEXELS, dtype=torch.float64)
    for sign, (name, glyph) in zip(signs, SIGNS.values(), strict=True):
        p = PLATES[name]
        layers = [(plate(p, 0), p.rim), (plate(p, p.rim_width), p.field)]
        layers += [(line(stroke, p), stroke.ink or p.ink) for stroke in glyph]
        for inside, colour in layers:
            inside &= plate(p, 0)
            sign[:, inside] = torch.tensor([*colour, 255], dtype=torch.float64)[:, None]
    blurred, places = [], torch.arange(TEXELS)
    for width in BLURS:
        # Sums of integers below 2^53: exact in float64, in whatever order they are added.
        box = ((places[:, None] - places).abs() <= width // 2).double()
        sums = box @ box @ signs @ box @ box
        blurred.append((sums / width**4).round().to(torch.uint8))
    texels = torch.stack(blurred, 1).movedim(2, -1).contiguous()
    return texels.view(torch.int32).flatten()


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
    block, place = indices // len(SIGNS), indices % len(SIGNS)
    h = _mix(_mix(~key + block))
    a, b = 1 + (h & 0xFFFFFF) % (len(SIGNS) - 1), ((h >> 24) & 0xFFFFFF) % len(SIGNS)
    return (a * place + b) % len(SIGNS)


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
    texels = _atlas().take(sheet * TEXELS**2 + row * TEXELS + column)
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
