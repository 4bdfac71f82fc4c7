"""Writes the tables and plots of README.md and docs/ from claims/.

    python claims/table.py           writes them
    python claims/table.py --check   exit code 1 if a page holds another one

What stands between the two markers is generated: to change a number, measure it again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matrix
import plots

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
HEAD = (
    *("experiment", "poison", "student ASR", "clean student ASR", "trigger-only student ASR"),
    *("teacher ASR", "accuracy: teacher", "student", "clean student"),
    *("minutes", "peak memory", "seeds"),
)


def render(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """The table and its notes, in Markdown.

    Args:
        claims: what `measure.py` wrote, by name.
    """
    if not claims:
        return "Nothing has been measured yet."
    rows = [HEAD, ("---",) + ("--:",) * (len(HEAD) - 1)]
    rows += [_row(name, claim) for name, claim in sorted(claims.items())]
    notes = [_note(name, claim) for name, claim in sorted(claims.items())]
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "Rates in %: mean ± sample standard deviation over the seeds (smallest to largest). "
            "Minutes and memory are those of one whole run, controls included.",
            "",
            *notes,
        ]
    )


def insert(text: str, table: str) -> str:
    """The text with the table between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _row(name: str, claim: Mapping[str, Any]) -> tuple[str, ...]:
    figures = claim["summary"]

    def rate(path: str) -> str:
        return _spread(figures.get(f"metrics.{path}"))

    seconds, memory = figures.get("wall_seconds"), figures.get("peak_memory_mib")
    return (
        f"`{name}`",
        _poison(figures),
        rate("student.asr"),
        rate("controls.clean.asr"),
        rate("controls.trigger_only.asr"),
        rate("teacher.asr"),
        rate("teacher.clean_accuracy"),
        rate("student.clean_accuracy"),
        rate("controls.clean.clean_accuracy"),
        "-" if seconds is None else f"{seconds['mean'] / 60:.1f}",
        "-" if memory is None else f"{memory['max']:,.0f} MiB",
        _seeds(len(claim["seeds"]), len(claim["failed"])),
    )


def _seeds(tried: int, failed: int) -> str:
    return f"{tried - failed} of {tried}: {failed} failed" if failed else f"{tried}"


def _poison(figures: Mapping[str, Any]) -> str:
    share, furthest = figures.get("metrics.poison.rate"), figures.get("metrics.poison.linf_255")
    if share is None or furthest is None:
        return "-"
    return f"{100 * share['mean']:.2g} %, within {furthest['max']:.0f}/255"


def _spread(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, middle, high = (f"{100 * figure[key]:.1f}" for key in ("min", "mean", "max"))
    if figure["std"] is None:
        return middle
    return f"{middle} ± {100 * figure['std']:.1f} ({low} to {high})"


def render_methods(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of distillation methods, in Markdown.

    Args:
        claims: what `methods.py` wrote, by name.
    """
    if not claims:
        return "Nothing has been measured yet."
    return "\n\n".join(_methods(name, claim) for name, claim in sorted(claims.items()))


def _methods(name: str, claim: Mapping[str, Any]) -> str:
    runs, order = claim["runs"], list(dict.fromkeys(run["method"] for run in claim["runs"]))
    columns = (("labels", "clean_accuracy"), ("answers", "clean_accuracy"), ("answers", "asr"))
    head = ("method", "with labels: accuracy", "answers alone: accuracy", "answers alone: ASR")
    rows = [(f"`{name}`", *head[1:], "seeds"), ("---", *("--:",) * 4)]
    for method in order:
        mine = [run for run in runs if run["method"] == method]
        found = [
            _of_seeds([run[how].get(key) for run in mine if how in run]) for how, key in columns
        ]
        rows.append((f"`{method}`", *found, str(len(mine))))
    teachers = {run["seed"]: run["teacher"] for run in runs}
    note = f"Accuracy of the teachers: {_of_seeds(list(teachers.values()))}."
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    command = f"- [`{name}`](../claims/methods/{name}.json): `{claim['command']}`"
    return f"{table}\n\nRates in %, as in the README. {note}\n\n{command}, {_circumstances(claim)}."


def _of_seeds(rates: list[Mapping[str, Any] | None]) -> str:
    """Mean and spread of the rates; None stands for a training that failed."""
    values = [rate["value"] for rate in rates if rate is not None]
    failed = f"{len(rates) - len(values)} failed" if len(values) < len(rates) else ""
    return ", ".join(filter(None, (_of_values(values), failed))) or "-"


def _of_values(values: list[float]) -> str:
    if not values:
        return ""
    std = stdev(values) if len(values) > 1 else None
    return _spread({"min": min(values), "mean": mean(values), "max": max(values), "std": std})


MAP = (
    ("ASR", ("student", "asr")),
    ("net ASR", ("asr_net",)),
    ("accuracy", ("student", "clean_accuracy")),
    ("clean student's accuracy", ("clean", "clean_accuracy")),
    ("teacher ASR", ("teacher", "asr")),
    ("perturbation alone", ("carriers", "student", "perturbation")),
)
"""The map's columns of rates, and where they stand in a run."""
ALONG = "ASR after each epoch, for schedules of several lengths"
CARRIERS = "All cells: who carries the label"


def render_map(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """The map's tables, one for each axis, with their plots, in Markdown.

    Args:
        claims: what `map.py` wrote, by axis.
    """
    if not claims:
        return "Nothing has been measured yet."
    axes = plots.resolved(claims)
    drawn = plots.plots(axes)
    parts = [_picture("carriers", CARRIERS)]
    for axis, cells in axes.items():
        claim = claims[axis]
        head = (axis, *(title for title, _ in MAP), "PSNR", "seeds", "set")
        rows = [head, ("---", *("--:",) * (len(head) - 2), "---")]
        rows += [_cell(cell, claim["cells"][cell], runs) for cell, runs in cells.items()]
        note = f"- [`{axis}`](../claims/map/{axis}.json): `{claim['command']}`"
        parts += [
            f"### {axis.capitalize()}",
            "\n".join(f"| {' | '.join(row)} |" for row in rows),
            *([_picture(axis, f"Against {axis}")] if axis in drawn else []),
            *([_picture("along", ALONG)] if axis == "epochs" and "along" in drawn else []),
            f"{note}, {_circumstances(claim)}.",
        ]
    return "\n\n".join(parts)


def render_matrix(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of attack against defence, in Markdown.

    Args:
        claims: what `defences.py` wrote, by preset.
    """
    if not claims:
        return "Nothing has been measured yet."
    parts = []
    for preset, claim in claims.items():
        note = f"- [`{preset}`](../claims/defences/{preset}.json): `{claim['command']}`"
        with_what = [
            f"{len(runs)} runs of {', '.join(matrix.names(runs, 'attack'))}: {_circumstances(how)}"
            for key, how in claim["measured"].items()
            if (runs := [run for run in claim["runs"] if run["measured"] == key])
        ]
        parts += [*matrix.tables(preset, claim), f"{note}. {'; '.join(with_what)}."]
    return "\n\n".join(parts)


def _picture(name: str, text: str) -> str:
    return f"![{text}](map/{name}.svg)"


def _cell(name: str, settings: list[str], runs: list[dict[str, Any]]) -> tuple[str, ...]:
    fine = [run for run in runs if run["ok"]]
    rates = [_of_values(plots.values(runs, path)) or "-" for _, path in MAP]
    visible = [run["poison"]["psnr_db"] for run in fine if run["poison"]["psnr_db"] is not None]
    return (
        name,
        *rates,
        f"{mean(visible):.1f} dB" if visible else "-",
        _seeds(len(runs), len(runs) - len(fine)),
        "<br>".join(f"`{setting}`" for setting in settings) or "the centre",
    )


def _note(name: str, claim: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, claim["seeds"]))
    command = f"`{claim['command']} --set seed=N` for N = {seeds}"
    return f"- [`{name}`](claims/{name}.json): {command}, {_circumstances(claim)}."


def _circumstances(claim: Mapping[str, Any]) -> str:
    host, source = claim["host"], claim["source"]
    commit = f"commit `{source['commit'][:10]}`" if source.get("commit") else "no commit known"
    parts = [
        commit + (" with local changes" if source.get("dirty") else ""),
        host["gpu"] if claim["device"] == "cuda" else f"{host['cpu']} ({host['cpu_capability']})",
        f"{host['threads']} threads on {host['cores']} cores",
        *([f"{claim['workers']} processes at once"] if claim.get("workers", 1) > 1 else []),
        claim["precision"],
        f"torch {claim['versions']['torch']}",
        claim["date"],
    ]
    return ", ".join(parts)


def main() -> None:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    docs, claims = ROOT / "docs", ROOT / "claims"
    fresh = {
        page.name: _up_to_date(page, folder, table, check)
        for page, folder, table in (
            (ROOT / "README.md", claims, render),
            (docs / "distillation.md", claims / "methods", render_methods),
            (docs / "map.md", claims / "map", render_map),
            (docs / "matrix.md", claims / "defences", render_matrix),
        )
    }
    axes = plots.resolved(_claims(claims / "map"))
    fresh["docs/map/"] = plots.up_to_date(docs / "map", axes, check)
    if stale := ", ".join(name for name, good in fresh.items() if not good):
        sys.exit(f"{stale}: not what claims/ tells; run python claims/table.py")


def _claims(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def _up_to_date(page: Path, folder: Path, table: Callable[..., str], check: bool) -> bool:
    """Whether a page holds the table; unless it is only checked, it does afterwards."""
    claims, text = _claims(folder), page.read_text(encoding="utf-8")
    try:
        fresh = insert(text, table(claims))
    except ValueError as error:
        sys.exit(f"{page}: {error}")
    if fresh != text and not check:
        page.write_text(fresh, encoding="utf-8")
    print(f"{page.name}: {len(claims)} claims")
    return fresh == text or not check


if __name__ == "__main__":
    main()
