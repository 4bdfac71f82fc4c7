"""Writes the table of results in README.md from claims/*.json.

    python claims/table.py           writes it
    python claims/table.py --check   exit code 1 if README.md holds another one

What stands between the two markers is generated: to change a number, measure it again.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
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


def _note(name: str, claim: Mapping[str, Any]) -> str:
    host, source = claim["host"], claim["source"]
    commit = f"commit `{source['commit'][:10]}`" if source.get("commit") else "no commit known"
    seeds = ", ".join(map(str, claim["seeds"]))
    parts = [
        f"`{claim['command']} --set seed=N` for N = {seeds}",
        commit + (" with local changes" if source.get("dirty") else ""),
        host["gpu"] if claim["device"] == "cuda" else f"{host['cpu']} ({host['cpu_capability']})",
        f"{host['threads']} threads on {host['cores']} cores",
        claim["precision"],
        f"torch {claim['versions']['torch']}",
        claim["date"],
    ]
    return f"- [`{name}`](claims/{name}.json): {', '.join(parts)}."


def main() -> None:
    """Writes or checks README.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    files = sorted((ROOT / "claims").glob("*.json"))
    claims = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    try:
        fresh = insert(text, render(claims))
    except ValueError as error:
        sys.exit(f"{readme}: {error}")
    if fresh == text:
        print(f"README.md: the table of {len(claims)} claims is up to date")
    elif check:
        sys.exit("README.md: the table is not that of claims/*.json; run python claims/table.py")
    else:
        readme.write_text(fresh, encoding="utf-8")
        print(f"README.md: wrote the table of {len(claims)} claims")


if __name__ == "__main__":
    main()
