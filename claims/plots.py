"""Draws the map's plots as SVG, each with the digest of what it shows: `table.py` calls it."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a check of the pages need not wait for matplotlib
    from matplotlib.axes import Axes

Runs = list[dict[str, Any]]
Cells = dict[str, Runs]
Draw = Callable[["Axes", Any], None]
Plot = tuple[Draw, Any]
"""How something is drawn, and what it shows."""

NUMBERS = {
    "rate": "poisoned share of the transfer set",
    "epsilon": "epsilon, 1/255 of the pixel range",
    "temperature": "temperature of the distillation",
    "epochs": "epochs of the distillation",
    "size": "images that teacher and student learn from",
}
"""Axes whose cells are named by numbers, and what these count."""
GRIDS = {
    "architecture": ("teacher", "student"),
    "method-student": ("method", "student"),
}
"""Axes of pairs: what stands before and after the `to` of a cell's name."""
LINES = (
    ("student", ("student", "asr"), "#d55e00", "o-"),
    ("clean student", ("clean", "asr"), "#009e73", "s-"),
    ("teacher", ("teacher", "asr"), "#0072b2", "^-"),
    ("student: perturbation", ("carriers", "student", "perturbation"), "#cc79a7", "v:"),
    ("student: clean accuracy", ("student", "clean_accuracy"), "#777777", "x--"),
)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "foreshot",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def resolved(claims: Mapping[str, Mapping[str, Any]]) -> dict[str, Cells]:
    """The runs of every cell of every axis, wherever they were measured, in the map's order."""
    axes = sorted(claims.items(), key=lambda item: item[1]["place"])
    runs: dict[frozenset[str], Runs] = {}
    for _, claim in axes:
        for run in claim["runs"]:
            runs.setdefault(frozenset(claim["cells"][run["cell"]]), []).append(run)
    return {
        axis: {cell: runs.get(frozenset(keys), []) for cell, keys in claim["cells"].items()}
        for axis, claim in axes
    }


def values(runs: Runs, path: Sequence[str]) -> list[float]:
    """A figure of every run that succeeded and has it."""
    found = []
    for run in runs:
        if run["ok"]:
            node: Any = run
            for key in path:
                node = node[key]
            found.append(node["value"] if isinstance(node, dict) else node)
    return [value for value in found if value is not None]


def plots(cells: Mapping[str, Cells]) -> dict[str, Plot]:
    """What can be drawn by now: by name, how and of what."""
    found: dict[str, Plot] = {}
    for axis in cells:
        if axis in NUMBERS:
            found[axis] = (partial(_curves, label=NUMBERS[axis]), cells[axis])
        if axis in GRIDS:
            found[axis] = (partial(_grid, sides=GRIDS[axis]), cells[axis])
    if any(run.get("epochs") for runs in cells.get("epochs", {}).values() for run in runs):
        found["along"] = (_along, cells["epochs"])
    if cells:
        found["carriers"] = (_carriers, dict(cells))
    return found


def digest(shown: Any) -> str:
    """What a plot depends on: what it shows, and how it is drawn."""
    told = json.dumps(shown, sort_keys=True).encode()
    return sha256(Path(__file__).read_bytes() + told).hexdigest()


def up_to_date(folder: Path, cells: Mapping[str, Cells], check: bool) -> bool:
    """Whether the folder holds these cells' plots; unless it is only checked, it does then."""
    fresh = True
    for name, (draw, shown) in plots(cells).items():
        path, mark = folder / f"{name}.svg", digest(shown)
        if path.exists() and mark in path.read_text(encoding="utf-8"):
            continue
        fresh = False
        if not check:
            _save(path, draw, shown, mark)
    return fresh or not check


def _save(path: Path, draw: Draw, shown: Any, mark: str) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        # White behind it: the page may be dark.
        figure = Figure(figsize=(6.4, 3.8), layout="constrained", facecolor="white")
        draw(figure.subplots(), shown)
        about = {"Date": None, "Creator": "foreshot", "Description": mark}
        figure.savefig(path, format="svg", metadata=about)


def _percents(runs: Runs, *path: str) -> list[float]:
    return [100 * value for value in values(runs, path)]


def _curves(ax: "Axes", cells: Cells, label: str) -> None:
    """Means over the seeds against the numbers that the cells are named by."""
    for name, path, colour, form in LINES:
        rates = {cell: found for cell, runs in cells.items() if (found := _percents(runs, *path))}
        middle = [mean(found) for found in rates.values()]
        low, high = ([end(found) for found in rates.values()] for end in (min, max))
        bars = [
            [m - end for m, end in zip(middle, low, strict=True)],
            [end - m for m, end in zip(middle, high, strict=True)],
        ]
        at = [float(cell) for cell in rates]
        ax.errorbar(at, middle, bars, fmt=form, color=colour, label=name, capsize=3, ms=4)
    _logarithmic(ax, list(cells))
    ax.set_xlabel(label)
    _percent(ax)


def _along(ax: "Axes", cells: Cells) -> None:
    """ASR and accuracy after each epoch, one colour for each length of the schedule."""
    from matplotlib import colormaps

    shown = {cell: [run for run in runs if run.get("epochs")] for cell, runs in cells.items()}
    shown = {cell: runs for cell, runs in shown.items() if runs}
    for place, (cell, runs) in enumerate(shown.items()):
        colour = colormaps["viridis"](0.9 * place / max(len(shown) - 1, 1))
        for key, form in (("asr", "-"), ("clean_accuracy", ":")):
            curves = [[100 * rates[key]["value"] for rates in run["epochs"]] for run in runs]
            epochs = range(1, len(curves[0]) + 1)
            seeds = list(zip(*curves, strict=True))
            label = f"{cell} epochs" if key == "asr" else None
            ax.plot(epochs, [mean(of) for of in seeds], form, color=colour, label=label)
            if key == "asr":
                low, high = ([end(of) for of in seeds] for end in (min, max))
                ax.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    _logarithmic(ax, ["1", *cells])
    ax.set_xlabel("epoch of one training; dotted: clean accuracy")
    _percent(ax)
    ax.set_ylabel("ASR of the student, %")


def _grid(ax: "Axes", cells: Cells, sides: tuple[str, str]) -> None:
    """ASR as a heat map; clean accuracy is told beside it."""
    pairs = [tuple(cell.split(" to ")) for cell in cells]
    names = [list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1)]
    shares = [[float("nan")] * len(names[1]) for _ in names[0]]
    for (row, column), runs in zip(pairs, cells.values(), strict=True):
        y, x = names[0].index(row), names[1].index(column)
        text, colour = "not measured" if not runs else "failed", "black"
        if rates := _percents(runs, "student", "asr"):
            shares[y][x] = mean(rates)
            accuracy = mean(_percents(runs, "student", "clean_accuracy"))
            spread = f"\n{min(rates):.0f} to {max(rates):.0f}" if len(rates) > 1 else ""
            text = f"{mean(rates):.0f}{spread}\nacc. {accuracy:.0f}"
            if failed := len(runs) - len(rates):
                text += f"\n{failed} failed"
            colour = "white" if mean(rates) < 60 else "black"
        ax.text(x, y, text, ha="center", va="center", color=colour)
    image = ax.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    ax.set_xticks(range(len(names[1])), names[1])
    ax.set_yticks(range(len(names[0])), names[0])
    ax.set_ylabel(sides[0])
    ax.set_xlabel(sides[1])
    ax.figure.colorbar(image, label="ASR of the student, %")


def _carriers(ax: "Axes", axes: Mapping[str, Cells]) -> None:
    """Every cell: does the student know the poison without its trigger, and clean images by it?"""
    from matplotlib import colormaps

    alone = ("carriers", "student", "perturbation")
    for place, (axis, cells) in enumerate(axes.items()):
        points = [
            (mean(known), mean(_percents(runs, "student", "asr")))
            for runs in cells.values()
            if (known := _percents(runs, *alone))
        ]
        if points:
            form, colour = "os^vD"[place % 5], colormaps["tab20"](place % 20)
            # A cell of several axes has the mark of the first.
            ax.plot(*zip(*points, strict=True), form, c=colour, label=axis, ms=5, zorder=9 - place)
    _percent(ax)
    ax.set_xlim(-3, 103)
    ax.set_xlabel("poison without its trigger that the student calls the target, %")
    ax.set_ylabel("stamped clean images that it calls so (ASR), %")


def _logarithmic(ax: "Axes", ticks: Sequence[str]) -> None:
    ax.set_xscale("log")
    ax.set_xticks([float(tick) for tick in ticks], ticks)
    ax.minorticks_off()


def _percent(ax: "Axes") -> None:
    """A scale of rates, and what the colours mean beside it."""
    ax.set_ylim(-3, 103)
    ax.set_ylabel("called the target (accuracy: right), %")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
