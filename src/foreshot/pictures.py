"""Pictures of a trigger and of poison, to be looked at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from foreshot.compute import Compute
from foreshot.data.base import ImageSet
from foreshot.errors import printable
from foreshot.files import replacing
from foreshot.inference import logits
from foreshot.poison import Poison
from foreshot.triggers.base import Trigger, stamp_uint8, unperturbed

SHOWN = 8
"""Poisoned images on a contact sheet, spread evenly over all of them."""


def trigger_portrait(path: Path, trigger: Trigger, transfer: ImageSet) -> None:
    """Draws the trigger by itself, and one image without and with it."""
    plain = transfer.images[:1]
    panels = {
        "trigger": trigger.draw(transfer.shape),
        "clean image": plain[0],
        "stamped image": stamp_uint8(trigger, plain)[0],
    }
    _draw(path, trigger.title, {"": list(zip(panels.values(), panels, strict=True))})


class Specimens(NamedTuple):
    """Some poison, spread evenly over all of it, beside what it was made of.

    Args:
        original: the images that the poison takes the place of, uint8 (n, C, H, W).
        perturbation: |stored - unperturbed(original)|, so bright that the largest one is white.
        stored: the poison.
        factor: by how much the perturbation is magnified.
    """

    original: Tensor
    perturbation: Tensor
    stored: Tensor
    factor: float


def specimens(
    transfer: ImageSet, poison: Poison, trigger: Trigger, stamps: bool | None = True
) -> Specimens:
    """At most `SHOWN` of the poison; see `unperturbed` for `stamps`."""
    count = min(SHOWN, len(poison))
    chosen = torch.linspace(0, max(len(poison) - 1, 0), count).long()
    original, stored = transfer.images[poison.indices[chosen]], poison.images[chosen]
    difference = (stored.short() - unperturbed(trigger, original, stored, stamps).short()).abs()
    factor = 255 / max(int(difference.max()), 1) if count else 1.0
    return Specimens(original, (difference * factor).to(torch.uint8), stored, factor)


def contact_sheet(
    path: Path,
    transfer: ImageSet,
    poison: Poison,
    trigger: Trigger,
    teacher: torch.nn.Module,
    compute: Compute,
    stamps: bool | None = True,
) -> None:
    """Draws some poison: original, perturbation, stored image; what the teacher says of each."""
    count = min(SHOWN, len(poison))
    if count == 0:
        _draw(path, "no poison", {})
        return
    original, difference, stored, factor = specimens(transfer, poison, trigger, stamps)

    def told(images: Tensor) -> list[tuple[Tensor, str]]:
        shares, numbers = logits(teacher, images, compute).softmax(1).max(1)
        names = [printable(transfer.classes[number]) for number in numbers.tolist()]
        texts = [
            f"{name if len(name) <= 18 else f'{name[:17]}…'}\n{share:.0%}"
            for name, share in zip(names, shares.tolist(), strict=True)
        ]
        return list(zip(images, texts, strict=True))

    rows = {
        "original": told(original),
        f"perturbation\n× {factor:.0f}": [(image, "") for image in difference],
        "stored\n(poisoned)": told(stored),
    }
    _draw(path, "poisoned by foreshot: what the teacher says of it", rows)


CELL, GAP, TEXT, SIDE = 1.25, 0.06, 0.32, 0.35
"""Inches: of an image, between two, of a text below one, of a title beside or above them."""


def _draw(path: Path, title: str, rows: Mapping[str, Sequence[tuple[Tensor, str]]]) -> None:
    """Images, uint8 (C, H, W), in rows with a name each, and a text below each image.

    On one pair of axes, in inches, as axes of their own would take most of the time.
    """
    widest = max([3, *map(len, rows.values())])
    beside = SIDE if any(rows) else 0
    texts = {name: TEXT * any(text for _, text in row) for name, row in rows.items()}
    width = beside + GAP + widest * (CELL + GAP)
    height = SIDE + sum(CELL + GAP + below for below in texts.values()) + GAP
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.text(width / 2, SIDE / 2, title, fontsize=10, ha="center", va="center", parse_math=False)
    top = SIDE
    for name, row in rows.items():
        middle = top + CELL / 2
        axes.text(beside / 2 + GAP, middle, name, fontsize=9, rotation=90, ha="center", va="center")
        for column, (image, text) in enumerate(row):
            left = beside + GAP + column * (CELL + GAP)
            high, wide = (CELL * side / max(image.shape[1:]) for side in image.shape[1:])
            x, y = left + (CELL - wide) / 2, top + (CELL - high) / 2
            _show(axes, image, (x, x + wide, y + high, y))
            place = left + CELL / 2, top + CELL + GAP / 2
            axes.text(*place, text, fontsize=7, ha="center", va="top", parse_math=False)
        top += CELL + GAP + texts[name]
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": "foreshot"})


def _show(axes: Axes, image: Tensor, extent: tuple[float, float, float, float]) -> None:
    array = image.permute(1, 2, 0).numpy()
    if array.shape[2] not in (3, 4):
        array = array[:, :, 0]
    axes.imshow(array, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
