"""The page of several runs: a table, and plots along what was varied."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from foreshot.record import REPORT, Run
from foreshot.report import charts
from foreshot.report.page import named, render
from foreshot.report.settings import ABSENT, short, shown, varying
from foreshot.tables import percent

LINES = len(charts.COLOURS)
"""Lines in a plot, at most: those with the most points."""
MAPS = 6
"""Heat maps, at most."""
LABEL = 24
"""Characters of a setting's value beside a plot."""

Columns = dict[str, list[Any]]
Cell = tuple[str, str]
"""What stands in a cell, and what the table is sorted by."""
Lines = dict[tuple[str, ...], dict[float, list[Run]]]
"""Runs by all the other settings, and by the number that they are drawn against."""


def page(runs: Sequence[Run], unfinished: Sequence[Path], where: Path) -> str:
    """The page as HTML.

    Args:
        runs: with metrics.
        unfinished: folders of runs without.
        where: the folder that the page will be in; links to the runs' own pages lead from there.
    """
    columns = varying([run.config for run in runs])
    ranges = {
        rate: f"{min(found):.1f} to {max(found):.1f}"
        for rate in ("asr", "clean_accuracy")
        if (found := _percents(runs, rate))
    }
    folders = os.path.commonpath([run.path.resolve().parent for run in runs])
    names = [named(os.path.relpath(run.path.resolve(), folders)) for run in runs]
    told = [
        {short(key): shown(values[number]) for key, values in columns.items()}
        for number in range(len(runs))
    ]
    figures = [_figures(run) for run in runs]
    heads = [head for head in figures[0] if any(cells[head][1] for cells in figures)]
    return render(
        "foreshot.report",
        "several.html.j2",
        script=(files("foreshot.report") / "several.js").read_text("utf-8"),
        count=len(runs),
        **ranges,
        unfinished=[named(str(path)) for path in unfinished],
        heads=["run", *map(short, columns), *heads],
        settings=len(columns),
        rows=[
            {
                "name": name,
                "link": _link(run, where),
                "settings": [(named(text), text) for text in settings.values()],
                "figures": [measured[head] for head in heads],
                "text": " ".join([name, *map("=".join, settings.items())]).lower(),
            }
            for run, name, settings, measured in zip(runs, names, told, figures, strict=True)
        ],
        plots=_plots(runs, columns),
        maps=_maps(runs, columns),
    )


def _link(run: Run, where: Path) -> str | None:
    """The way to the run's own page, if it has one."""
    page = run.path / REPORT
    return quote(os.fsencode(os.path.relpath(page, where))) if page.exists() else None


def _figures(run: Run) -> dict[str, Cell]:
    """What a run measured, by the column's heading."""
    metrics = run.metrics
    teacher, student = metrics["teacher"], metrics["student"]
    clean, seconds = metrics["controls"].get("clean"), metrics["seconds"]["total"]
    net, auroc = student["asr_net"], metrics.get("defence", {}).get("auroc")
    return {
        "ASR, %": _rate(student["asr"]),
        "clean accuracy, %": _rate(student["clean_accuracy"]),
        "net ASR": ("–", "") if net is None else (f"{100 * net:+.1f}", str(net)),
        "clean student: ASR": _rate(clean["asr"]) if clean else ("–", ""),
        "teacher: ASR": _rate(teacher["asr"]),
        "teacher: accuracy": _rate(teacher["clean_accuracy"]),
        "defence: AUROC": ("–", "") if auroc is None else (f"{auroc:.3f}", str(auroc)),
        "minutes": (f"{seconds / 60:.1f}", str(seconds)),
    }


def _rate(rate: dict[str, Any]) -> Cell:
    return percent(rate), "" if rate["value"] is None else str(rate["value"])


def _percents(runs: Sequence[Run], key: str) -> list[float]:
    return [100 * run.metrics["student"][key]["value"] for run in runs]


def _numeric(values: Sequence[Any]) -> bool:
    numbers = [v for v in values if v is not ABSENT and v is not None]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers)


def _plots(runs: Sequence[Run], columns: Columns) -> list[Markup]:
    """ASR and accuracy against each number that varies; what else does, has a line each."""
    found = []
    for key, values in columns.items():
        if key == "seed" or not _numeric(values):
            continue
        others = [other for other in columns if other not in (key, "seed")]
        lines: dict[tuple[str, ...], dict[float, list[Run]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for run, value, *rest in zip(runs, values, *(columns[k] for k in others), strict=True):
            if value is not ABSENT and value is not None:
                lines[tuple(map(shown, rest))][value].append(run)
        kept = [line for line in lines if len(lines[line]) > 1]
        kept = sorted(kept, key=lambda line: -sum(map(len, lines[line].values())))[:LINES]
        if kept:
            asr, accuracy = (
                {
                    _title(line, others, kept): [
                        (number, _percents(some, rate))
                        for number, some in sorted(lines[line].items())
                    ]
                    for line in kept
                }
                for rate in ("asr", "clean_accuracy")
            )
            found.append(charts.against(short(key), asr, accuracy))
    return found


def _title(line: tuple[str, ...], keys: Sequence[str], lines: Sequence[tuple[str, ...]]) -> str:
    """What tells a line from the others of its plot."""
    return ", ".join(
        f"{short(key)} {value}"
        for key, value, *rest in zip(keys, line, *lines, strict=True)
        if len(set(rest)) > 1
    )


def _maps(runs: Sequence[Run], columns: Columns) -> list[Markup]:
    """ASR for each pair of settings that are no numbers, where both vary by themselves."""
    found = []
    words = [key for key, values in columns.items() if not _numeric(values)]
    for pair in combinations(words, 2):
        cells: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run, *values in zip(runs, *(columns[key] for key in pair), strict=True):
            if ABSENT not in values:
                first, second = map(shown, values)
                cells[first, second].append(run)
        rows, heads = (list(dict.fromkeys(cell[side] for cell in cells)) for side in (0, 1))
        crossed = all(
            any(sum(cell[side] == name for cell in cells) > 1 for name in names)
            for side, names in enumerate((rows, heads))
        )
        if crossed:
            grid = [[cells.get((row, head), []) for head in heads] for row in rows]
            shares = [
                [mean(_percents(some, "asr") or [math.nan]) for some in line] for line in grid
            ]
            texts = [[_text(some) for some in line] for line in grid]
            sides = short(pair[0]), short(pair[1])
            down, across = ([named(name, LABEL) for name in names] for names in (rows, heads))
            found.append(charts.heat(down, across, shares, texts, sides))
    return found[:MAPS]


def _text(runs: Sequence[Run]) -> str:
    if not runs:
        return "not\nmeasured"
    rates, accuracy = _percents(runs, "asr"), mean(_percents(runs, "clean_accuracy"))
    spread = f"{min(rates):.0f} to {max(rates):.0f}\n" if len(rates) > 1 else ""
    return f"{mean(rates):.0f}\n{spread}acc. {accuracy:.0f}"
