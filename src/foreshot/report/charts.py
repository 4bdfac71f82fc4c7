"""Plots as inline SVG: the page's own ink and font, and the same bytes for the same figures."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"
"""Stands for the colour of the page's text, which is another one in the dark."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "foreshot",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#999999")
"""Okabe and Ito's, which the colour-blind can tell apart; black would be lost in the dark."""
WIDTH = 4.4
"""Inches: what a phone shows without shrinking it much."""
SPAN = 20
"""A scale is logarithmic if its largest number is that many times its smallest."""

Points = Sequence[tuple[int, float]]
"""Epochs, ascending, and what was measured after each."""
Curve = Sequence[tuple[float, Sequence[float]]]
"""Numbers, ascending, and the rates in percent that were measured there."""


def svg(draw: Callable[[Axes], None], height: float, alt: str, width: float = WIDTH) -> Markup:
    """What `draw` draws, as an element of a page."""
    with rc_context(STYLE), warnings.catch_warnings():
        # Glyphs that matplotlib's font lacks: the browser's has them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=none)
    text = stream.getvalue().replace(INK, "currentColor")
    # No smaller than this on a narrow page, which scrolls it.
    opening = f'<svg role="img" aria-label="{escape(alt)}" style="min-width: {0.75 * width:.1f}in"'
    return Markup(opening + text[text.index("<svg") + 4 :])  # noqa: S704 - matplotlib escapes it


def losses(curves: Mapping[str, Points]) -> Markup:
    """Loss against epoch, one line for each training."""

    def draw(ax: Axes) -> None:
        for place, (name, points) in enumerate(curves.items()):
            form = "o" + ("-", "--", ":")[place // len(COLOURS) % 3]
            colour = COLOURS[place % len(COLOURS)]
            ax.plot(*zip(*points, strict=True), form, color=colour, label=name, ms=3)
        if all(loss > 0 for points in curves.values() for _, loss in points):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
        ax.set_ylabel("mean loss")
        _finish(ax)

    return svg(draw, 2.6 + 0.1 * len(curves), "Loss per epoch of each training")


def rates(asr: Mapping[str, Points], accuracy: Mapping[str, Points]) -> Markup:
    """ASR and clean accuracy in percent against epoch, two lines for each training.

    Args:
        asr: of each training, by its name.
        accuracy: the same trainings.
    """

    def draw(ax: Axes) -> None:
        for place, name in enumerate(asr):
            colour = COLOURS[place % len(COLOURS)]
            ax.plot(*zip(*asr[name], strict=True), "o-", color=colour, label=f"{name}: ASR", ms=3)
            ax.plot(*zip(*accuracy[name], strict=True), "x:", color=colour, ms=3)
        ax.set_ylim(-3, 103)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
        ax.set_ylabel("%; dotted: clean accuracy")
        _finish(ax)

    return svg(draw, 2.6 + 0.1 * len(asr), "ASR and clean accuracy per epoch of each student")


def against(label: str, asr: Mapping[str, Curve], accuracy: Mapping[str, Curve]) -> Markup:
    """ASR and clean accuracy against a number: means, smallest and largest of the seeds.

    Args:
        label: what the number is.
        asr: of each line, by its name.
        accuracy: the same lines.
    """

    def draw(ax: Axes) -> None:
        for place, name in enumerate(asr):
            colour = COLOURS[place % len(COLOURS)]
            for form, curve, text in (
                ("o-", asr[name], f"{name}: ASR" if name else "ASR"),
                ("x:", accuracy[name], None if name else "clean accuracy"),
            ):
                at, rates = zip(*curve, strict=True)
                middle = [mean(some) for some in rates]
                low, high = ([end(some) for some in rates] for end in (min, max))
                bars = [
                    [m - end for m, end in zip(middle, low, strict=True)],
                    [end - m for m, end in zip(middle, high, strict=True)],
                ]
                ax.errorbar(at, middle, bars, fmt=form, color=colour, label=text, capsize=3, ms=4)
        ticks = sorted({x for curve in asr.values() for x, _ in curve})
        if ticks[0] > 0 and ticks[-1] >= SPAN * ticks[0]:
            ax.set_xscale("log")
            ax.minorticks_off()
            ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.set_ylim(-3, 103)
        ax.set_xlabel(label)
        ax.set_ylabel("%; dotted: clean accuracy")
        _finish(ax)

    return svg(draw, 2.7 + 0.2 * len(asr), f"ASR and clean accuracy against {label}")


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    sides: tuple[str, str],
    cell: tuple[float, float] = (0.8, 0.6),
) -> Markup:
    """A table of shares, in percent, as colours.

    Args:
        rows: their names.
        columns: theirs.
        shares: one row a name; NaN is left empty.
        texts: what stands in the cells.
        sides: what rows and columns are.
        cell: width and height of one, in inches.
    """

    def draw(ax: Axes) -> None:
        ax.pcolormesh(shares, vmin=0, vmax=100, cmap="viridis", edgecolors=INK, linewidth=0.3)
        ax.invert_yaxis()
        for y, line in enumerate(texts):
            for x, text in enumerate(line):
                share = shares[y][x]
                colour = INK if share != share else "white" if share < 60 else "black"
                ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour, size=7)
        slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks([x + 0.5 for x in range(len(columns))], columns, **slant)
        ax.set_yticks([y + 0.5 for y in range(len(rows))], rows)
        ax.tick_params(length=0)
        ax.set_ylabel(sides[0])
        ax.set_xlabel(sides[1])

    beside = 0.5 + 0.075 * max(map(len, rows))
    below = 0.5 + 0.055 * max(map(len, columns))
    width, height = beside + cell[0] * len(columns), below + cell[1] * len(rows)
    return svg(draw, height, f"{sides[0]} against {sides[1]}", width)


def _finish(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.figure.legend(loc="outside lower center", ncols=2)  # pyright: ignore[reportAttributeAccessIssue]
