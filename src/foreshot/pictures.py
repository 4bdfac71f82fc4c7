"""Pictures of a trigger and of poison, to be looked at."""

from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from foreshot.compute import Compute
from foreshot.data.base import ImageSet
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
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        _show(axes, image)
        axes.set_title(title, fontsize=9)
    figure.suptitle(trigger.title, fontsize=10)
    _save(figure, path)


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
    figure = Figure(figsize=(1.25 * max(count, 3), 4.4), layout="constrained")
    if count == 0:
        figure.text(0.5, 0.5, "no poison", ha="center", va="center")
        return _save(figure, path)
    original, difference, stored, factor = specimens(transfer, poison, trigger, stamps)
    rows = {
        "original": original,
        f"perturbation\n× {factor:.0f}": difference,
        "stored\n(poisoned)": stored,
    }
    grid = figure.subplots(3, count, squeeze=False)
    for line, (title, images) in zip(grid, rows.items(), strict=True):
        said = logits(teacher, images, compute).softmax(1)
        for column, (axes, image) in enumerate(zip(line, images, strict=True)):
            _show(axes, image)
            if images is not rows["original"] and images is not stored:
                continue
            share, number = said[column].max(0)
            name = transfer.classes[int(number)]
            name = name if len(name) <= 18 else f"{name[:17]}…"
            axes.set_xlabel(f"{name}\n{float(share):.0%}", fontsize=7, parse_math=False)
        line[0].set_ylabel(title, fontsize=9)
    figure.suptitle("poisoned by foreshot: what the teacher says of it", fontsize=10)
    return _save(figure, path)


def _show(axes: Axes, image: Tensor) -> None:
    array = image.permute(1, 2, 0).numpy()
    if array.shape[2] not in (3, 4):
        array = array[:, :, 0]
    axes.imshow(array, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": "foreshot"})
