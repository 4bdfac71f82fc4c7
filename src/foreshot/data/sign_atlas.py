"""The 43 signs that `signs` shows, drawn once by formula into an atlas."""

from functools import cache
from itertools import pairwise
from math import cos, pi, sin
from typing import NamedTuple

import torch
from torch import Tensor

Colour = tuple[int, int, int]
BLACK, GREY, WHITE = (25, 25, 28), (90, 90, 92), (235, 235, 230)
RED, BLUE, YELLOW, GREEN = (190, 28, 40), (25, 75, 170), (240, 190, 30), (20, 140, 70)

TEXELS, REACH = 128, 1.25
"""A sign is kept as TEXELS x TEXELS texels that span [-REACH, REACH]; its own radius is 1."""

BLURS = (5, 9, 13, 15)
"""Widths in texels of the box filter that is run twice over a sign; some four are a pixel."""


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
def atlas() -> Tensor:
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
