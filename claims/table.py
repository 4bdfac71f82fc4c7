"""Writes the tables of README.md and docs/distillation.md from claims/ and claims/methods/.

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
    figures, failed = claim["summary"], claim["failed"]
    tried = len(claim["seeds"])
    seeds = f"{tried}" if not failed else f"{tried - len(failed)} of {tried}: {len(failed)} failed"

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
        seeds,
    )


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
    if not values:
        return failed or "-"
    spread = {"min": min(values), "mean": mean(values), "max": max(values)}
    std = stdev(values) if len(values) > 1 else None
    return ", ".join(filter(None, (_spread(spread | {"std": std}), failed)))


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
        claim["precision"],
        f"torch {claim['versions']['torch']}",
        claim["date"],
    ]
    return ", ".join(parts)


def main() -> None:
    """Writes or checks README.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    stale = [
        page.name
        for page, folder, table in (
            (ROOT / "README.md", ROOT / "claims", render),
            (ROOT / "docs" / "distillation.md", ROOT / "claims" / "methods", render_methods),
        )
        if not _up_to_date(page, folder, table, check)
    ]
    if stale:
        sys.exit(f"{', '.join(stale)}: not the tables of claims/; run python claims/table.py")


def _up_to_date(page: Path, folder: Path, table: Callable[..., str], check: bool) -> bool:
    """Whether a page holds the table; unless it is only checked, it does afterwards."""
    files = sorted(folder.glob("*.json"))
    claims = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    text = page.read_text(encoding="utf-8")
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
