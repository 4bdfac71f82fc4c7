"""The tables of attack against defence, of what `defences.py` wrote: `table.py` calls it."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

Runs = Sequence[dict[str, Any]]
Show = Callable[[Runs], str]
"""How the runs of a cell, one a seed, are told."""

NONE = "none"
"""The column without an attack, and the row without a defence."""


def tables(preset: str, claim: Mapping[str, Any]) -> list[str]:
    """The tables of one preset, in Markdown.

    Args:
        preset: its name.
        claim: what `defences.py` wrote of it.
    """
    runs: Runs = claim["runs"]
    screens, monitors = with_part(runs, "screen"), with_part(runs, "monitor")
    students = with_part([run for run in runs if "monitor" not in run], "student")
    seeds = Counter(run["seed"] for run in runs)
    counted = ", ".join(f"{count} of seed {seed}" for seed, count in sorted(seeds.items()))
    parts = [
        f"### {preset}",
        f"{len(runs)} runs, {counted}; means over the seeds of a cell, in % but for AUROC.",
        "#### The student",
        "ASR, and behind it clean accuracy, of the student that is used in the end. The column "
        f"`{NONE}` has no poison: there, what a defence costs. Repairs have less clean data than "
        "the others, and an undefended student of their own set beside them.",
        table(students, asr),
        "Seconds: of the screen, with the student that it looks at; of the student, where the "
        "defence is in its distillation, and of one that its screens look at; "
        "of the repair; of the monitor. A teacher that is trained "
        "for it, as `second_teacher` and `adversarial_teacher` need one, is not counted.",
        "#### Ranking",
        f"Of the students that every row here has: {shared(students)}. ASR: the mean over those "
        "that were attacked, and over the adaptive attacks. Accuracy: what is lost against no "
        "defence, in points, the mean over all of them and the most. Not ranked is a defence "
        f"with neither a column `{NONE}` nor undefended students of its own.",
        ranking(students),
        "#### Screens",
        "AUROC, and behind it the share of the poison found at 1 % of the clean images; without "
        "an attack, the share of the images that is removed.",
        table(screens, found),
    ]
    if monitors:
        parts += [
            "#### Monitors",
            "AUROC of stamped inputs against clean ones, and behind it the ASR that goes "
            "unnoticed at the alarms that the monitor allows.",
            table(monitors, noticed),
        ]
    failed = [run for run in runs if not run["ok"]]
    if failed:
        lines = (
            f"- {r['attack']} against {r['defence']}, seed {r['seed']}: {r['failed']}"
            for r in failed
        )
        parts += ["#### Failed", "\n".join(lines)]
    return parts


def with_part(runs: Runs, part: str) -> Runs:
    """The runs that hold a part."""
    return [run for run in runs if part in run]


def table(runs: Runs, show: Show) -> str:
    """Defences down, attacks across, in the order in which they were measured; then the seconds."""
    attacks, defences = names(runs, "attack"), names(runs, "defence")
    rows = [("defence", *attacks, "seconds"), ("---", *("--:",) * (len(attacks) + 1))]
    for defence in defences:
        cells = [show(of(runs, attack, defence)) for attack in attacks]
        seconds = mean(run["seconds"] for run in runs if run["defence"] == defence)
        rows.append((f"`{defence}`", *cells, f"{seconds:.1f}"))
    return markdown(rows)


def common(runs: Runs) -> Runs:
    """The runs of attacks and seeds that every defence has: others would rank what is not alike.

    Not ranked, as nobody knows what it costs: a defence that was not measured without an attack,
    and has no undefended students of its own to be compared with, as repairs do.
    """
    ranked = {run["defence"] for run in runs if run["attack"] == NONE or "undefended" in run}
    runs = [run for run in runs if run["defence"] in ranked]
    cells = [
        {(run["attack"], run["seed"]) for run in runs if run["defence"] == defence}
        for defence in names(runs, "defence")
    ]
    every = set.intersection(*cells) if cells else set()
    return [run for run in runs if (run["attack"], run["seed"]) in every]


def shared(runs: Runs) -> str:
    """Which attacks and seeds those are."""
    seeds = {
        attack: sorted({run["seed"] for run in common(runs) if run["attack"] == attack})
        for attack in names(common(runs), "attack")
    }
    return ", ".join(f"`{a}` (seed {', '.join(map(str, s))})" for a, s in seeds.items()) or "none"


def ranking(runs: Runs) -> str:
    """The defences by the ASR that they leave."""
    runs = common(runs)
    attacks = [name for name in names(runs, "attack") if name != NONE]
    adaptive = [name for name in attacks if name.startswith("adaptive")]
    rows = []
    for defence in names(runs, "defence"):
        mine = [run for run in runs if run["defence"] == defence]
        asrs = values((run for run in mine if run["attack"] in attacks), "asr")
        worst = values((run for run in mine if run["attack"] in adaptive), "asr")
        # A repair stands beside the undefended student of its own transfer set.
        losses = [
            run.get("undefended", other["student"])["clean_accuracy"]["value"]
            - run["student"]["clean_accuracy"]["value"]
            for run in mine
            for other in of(runs, run["attack"], NONE)
            if other["seed"] == run["seed"]
        ]
        if asrs and losses:
            lost = (f"{100 * of_all(losses):+.1f}" for of_all in (mean, max))
            row = (f"`{defence}`", percent(asrs), percent(worst), *lost)
            rows.append((mean(asrs), row))
    head = ("defence", "ASR", "ASR, adaptive", "accuracy lost", "at most")
    ordered = [row for _, row in sorted(rows)]
    return markdown([head, ("---", *("--:",) * (len(head) - 1)), *ordered])


def asr(runs: Runs) -> str:
    """ASR and clean accuracy."""
    if not runs:
        return ""
    accuracy = percent(values(runs, "clean_accuracy"))
    return f"{percent(values(runs, 'asr'))} ({accuracy})"


def found(runs: Runs) -> str:
    """AUROC and TPR, or what is removed where there is no poison."""
    if not runs:
        return ""
    of_all = [run["screen"] for run in runs]
    if any(one["auroc"] is None for one in of_all):
        return percent([one["removed"]["value"] for one in of_all])
    auroc = mean(one["auroc"] for one in of_all)
    return f"{auroc:.3f} ({percent([one['tpr'] for one in of_all])})"


def noticed(runs: Runs) -> str:
    """AUROC and the ASR that is left."""
    if not runs:
        return ""
    auroc = mean(run["monitor"]["auroc"] for run in runs)
    left = percent([run["monitor"]["asr_unnoticed"]["value"] for run in runs])
    return f"{auroc:.3f} ({left})"


def of(runs: Runs, attack: str, defence: str) -> Runs:
    """The runs of a cell."""
    return [run for run in runs if (run["attack"], run["defence"]) == (attack, defence)]


def names(runs: Runs, key: str) -> list[str]:
    """The attacks or the defences, in order."""
    return list(dict.fromkeys(run[key] for run in runs))


def values(runs: Iterable[dict[str, Any]], key: str) -> list[float]:
    """A rate of the students."""
    return [run["student"][key]["value"] for run in runs]


def percent(rates: Sequence[float]) -> str:
    """The mean, in %."""
    return f"{100 * mean(rates):.1f}" if rates else ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
