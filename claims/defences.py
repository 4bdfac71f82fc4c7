"""Measures the matrix: every attack against every defence, and what a defence costs without one.

    python claims/defences.py signs                             # all of it, three seeds
    python claims/defences.py signs --attacks none pgd --seeds 0
    python claims/defences.py signs --defences combined clp     # some rows

A cell is what `foreshot run` with the command in its row measures. Of most screens it is the scores
alone; a student is distilled on what those of `DISTILLED` keep. The defender has the clean images
of `SETTINGS`: enough of them to find 1 % of poison by a screen, and 1 % of the set for a repair.
Columns named `adaptive` are attackers who know the defence: they craft through the changes that
it makes, against several teachers, or let half of the poison be faint triggers.

One JSON a preset, in claims/defences/, written after every cell; teachers, poison and undefended
students are shared through the store. Run the same command again to go on: a cell that is in the
file is not run again, unless the source, the machine or the cell itself has changed. Cells that are
not asked for stay as they are, and each says with what it was measured. A cell that fails stays in
the file.
"""

import argparse
import shlex
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import outcomes

from foreshot.compute import Compute, Device, compute, with_threads
from foreshot.config import Config, load_config
from foreshot.defences import DEFENCES, Monitor, Repair, Screen
from foreshot.defences.scoring import quality
from foreshot.errors import ForeshotError
from foreshot.files import read_json, write_json
from foreshot.guard import DEFENDING, Guard
from foreshot.progress import plain
from foreshot.record import environment
from foreshot.stages import CRAFTING, Stages
from foreshot.store import Store, content_hash, home, source_digest
from foreshot.workers import Workers

FOLDER = Path(__file__).parent / "defences"
SOURCE = (*CRAFTING, *DEFENDING, "guard.py", "stages.py", "division.py", "data", "metrics.py")
"""What the numbers depend on: a row of another source is measured anew."""

Settings = tuple[str, ...]
Cell = tuple[str, str, int]
"""Attack, defence, seed."""

ONE = "attack.rate=0.01"
KIND = "{name: resnet, depth: 8, width: 1.5, stem_stride: 2}"
CHANGES = "attack.through=[none, jpeg, blur, noise, resize, depth]"
ALL_CHANGES = "attack.through=[none, jpeg, blur, noise, resize, depth, median, shift]"
"""With the two more that the screen `consistency` makes: all of its own."""
THREE = f"{{name: ensemble, count: 3, of: {KIND}}}"
OTHERS = f"surrogate={{training: {{epochs: 8}}, model: {THREE}, with_teacher: true}}"
"""An attacker's own three teachers, beside the victim's: the poison is to convince them all."""
COUNTERFACTUAL = "attack.name=counterfactual"
SMALL = ("attack.step=0.5", "attack.steps=150", "attack.retries=0")
"""Small steps, many of them: in the setting of the matrix they get through where the default, few
large ones, does not always (`claims/map.py steps` finds no difference where it does)."""
UNSEEN = ("attack.detectors=2", "attack.direction=sign", *SMALL)
"""Against the screen `detector`: by many small steps, as few large ones, the default, cost the
attack most of its effect (docs/safe-distillation.md)."""


def _attacks(*names: str) -> dict[str, Settings]:
    return {name: (f"attack.name={name}",) for name in names}


ATTACKS: dict[str, Settings] = {
    "none": ("attack.name=clean",),
    **_attacks("counterfactual", "pgd"),
    "counterfactual, 1 %": (COUNTERFACTUAL, ONE),
    "counterfactual, small steps, 1 %": (COUNTERFACTUAL, ONE, *SMALL),
    "pgd, 1 %": ("attack.name=pgd", ONE),
    "adaptive: changes": (COUNTERFACTUAL, CHANGES),
    "adaptive: all changes": (COUNTERFACTUAL, ALL_CHANGES),
    "adaptive: teachers": (COUNTERFACTUAL, OTHERS),
    "adaptive: both": (COUNTERFACTUAL, CHANGES, OTHERS),
    "adaptive: covers": ("attack.name=covered",),
    "adaptive: detectors, 1 %": (COUNTERFACTUAL, ONE, *UNSEEN),
    "blend": (COUNTERFACTUAL, "trigger={name: blend, opacity: 0.15}"),
    **_attacks("fgsm", "cw", "tang", "dehib"),
    "cw_l2": ("attack.name=cw_l2", "attack.steps=20"),
    # Of one class of 43 there are not as many images as 5 %.
    "label_consistent, 1 %": ("attack.name=label_consistent", ONE),
    # Of the paper's 250 steps a student learns less than of 20.
    "sleeper_agent, 1 %": ("attack.name=sleeper_agent", ONE, "attack.steps=20"),
    "sleeper_agent, 250 steps, 1 %": ("attack.name=sleeper_agent", ONE, "attack.steps=250"),
}
"""Columns, at a poisoning rate of 5 % where nothing else is said; the most telling come first."""
SETTINGS: dict[str, dict[str, Settings]] = {
    "signs": {
        "repair": ("data.train=6565", "defender.clean=65"),
        "": ("data.train=7500", "defender.clean=1000"),
    },
    "fashion-mnist-10k": {
        "repair": ("defender.clean=99",),
        "": ("defender.clean=1000",),
    },
}
"""What each kind of defence has to go on, by preset. On `signs` the transfer set has 6,500 images
for all; fashion-mnist-10k has no more than it has, so that repairs there have a larger one."""
UNDEFENDED = "none"
WITHOUT = "disagreement"
"""What stands in a config without a defence: a monitor leaves the student as it is, and the clean
images are set aside as for all others; without it the transfer set would be larger."""
DISTILLED = ("combined", "consistency", "second_teacher")
"""Screens on whose result a student is distilled: the ones that an engineer would switch on."""
NEEDS_LABELS = ("label_disagreement",)
"""Not in the matrix: an attack that changes images alone leaves the labels right."""
RULES: dict[str, Settings] = {
    "drop 0.05": ("defender.drop=0.05",),
    "level 0.2": ("defender.level=0.2",),
}
"""Other rules than the default by which those screens remove images: behind their name, in rows of
their own."""
SCREENS_BEFORE = (
    *("consistency", "second_teacher", "label_disagreement", "frequency", "near_duplicate"),
    "scan",
)
LESS = f"defence.screens=[{', '.join(f'{{name: {name}}}' for name in SCREENS_BEFORE)}]"
WITHOUT_DETECTOR: dict[str, Settings] = {
    "without detector": (LESS,),
    "without detector, drop 0.05": (LESS, "defender.drop=0.05"),
}
"""What `combined` was before `detector` was among its screens."""
ROWS = (
    UNDEFENDED,
    *(name for name in DEFENCES if name not in NEEDS_LABELS),
    *(f"{name}, {rule}" for rule in RULES for name in DISTILLED),
    *(f"combined, {rule}" for rule in WITHOUT_DETECTOR),
)


def config_of(preset: str, attack: str, defence: str, seed: int) -> Config:
    """The experiment of a cell."""
    return load_config(preset, settings_of(preset, attack, defence, seed))


def settings_of(preset: str, attack: str, defence: str, seed: int) -> list[str]:
    """What a cell sets over its preset."""
    name, _, rule = (WITHOUT if defence == UNDEFENDED else defence).partition(", ")
    kinds, rules = SETTINGS[preset], (RULES | WITHOUT_DETECTOR)[rule] if rule else ()
    own = kinds.get(DEFENCES[name].kind, kinds[""])
    return [*own, *rules, *ATTACKS[attack], f"defence.name={name}", f"seed={seed}"]


def measure(config: Config, store: Store, engine: Compute, defence: str) -> dict[str, Any]:
    """One cell with one seed.

    Args:
        config: its experiment.
        store: where finished stages are.
        engine: where to run.
        defence: its row.
    """
    stages = Stages(config, store, engine, home() / "data", plain)
    guard, teacher = Guard(stages), stages.teacher()
    stages.learn_trigger(teacher)
    poison = stages.poison(teacher)
    found: dict[str, Any] = {"poison": len(poison.poison)}
    if isinstance(config.defence, Screen):
        screened = guard.screen(teacher, poison)
        found["screen"] = quality(screened.verdict, poison.poison, config.target)
        found["seconds"] = screened.seconds
        if config.defence.name not in DISTILLED:
            return found
    defended = guard.student(teacher, poison)
    if isinstance(config.defence, Monitor) and defence != UNDEFENDED:
        watch = guard.watch(teacher, poison, defended.student)
        found["monitor"] = read_json(watch.folder / "watch.json")
        found["seconds"] = watch.seconds
    students = {"student": defended.student}
    if isinstance(config.defence, Repair) and defended.undefended is not None:
        students["undefended"] = defended.undefended
    measured, _ = stages.evaluation(teacher, poison, students)
    for name in (*students, "teacher"):
        found[name] = {key: measured[name][key] for key in ("clean_accuracy", "asr")}
    taught = 0.0 if isinstance(config.defence, Repair) else defended.student.artefact.seconds
    found.setdefault("seconds", defended.seconds + taught)
    return found


def cost(cells: list[tuple[str, str, int]], runs: list[dict[str, Any]]) -> str:
    """What cells would take, by what those of the same defence have taken, on whatever machine."""
    seconds: dict[str, list[float]] = {}
    for run in runs:
        if "seconds" in run:
            seconds.setdefault(run["defence"], []).append(run["seconds"])
    if not seconds:
        return f"{len(cells)} cells; none is measured yet that would tell how long"
    usual = mean(second for of_one in seconds.values() for second in of_one)
    total = sum(mean(seconds.get(defence, [usual])) for _, defence, _ in cells)
    return f"{len(cells)} cells, about {total / 60:.0f} minutes"


def attempt(preset: str, device: Device, threads: int, cell: Cell) -> dict[str, Any]:
    """What a cell comes to: here, or in a worker."""
    with with_threads(threads):
        config = config_of(preset, *cell)
        return measure(config, Store.open(plain), compute(device), cell[1])


def fill(
    preset: str, attacks: list[str], rows: list[str], seeds: list[int], device: Device, workers: int
) -> None:
    """Measures what the preset's file lacks; writes it after each cell."""
    circumstances, out = environment(), FOLDER / f"{preset}.json"
    same = {
        "code": source_digest(*SOURCE),
        **compute(device).describe(),
        **{key: circumstances[key] for key in ("versions", "host")},
    }
    before = read_json(out) if out.exists() else {"measured": {}, "runs": []}
    done = {(run["attack"], run["defence"], run["seed"]): run for run in before["runs"]}
    now = same | {"source": circumstances["source"], "date": datetime.now(UTC).date().isoformat()}
    now["workers"] = workers
    key = content_hash(now)[:8]
    measured: dict[str, dict[str, Any]] = before["measured"] | {key: now}
    left: dict[Cell, str] = {}
    for cell in ((a, d, s) for s in seeds for a in attacks for d in rows):
        config = config_of(preset, *cell).model_dump(mode="json", exclude_unset=True)
        digest = content_hash(config)
        run = done.get(cell)
        if (
            run is None
            or run["config"] != digest
            or not same.items() <= measured[run["measured"]].items()
        ):
            left[cell] = digest
    print(cost(list(left), before["runs"]), flush=True)
    work = partial(attempt, preset, device, torch.get_num_threads())
    title = "{0[0]} | {0[1]}, seed {0[2]}".format
    for cell, found in outcomes(work, list(left), workers, title):
        keys = [part for setting in settings_of(preset, *cell) for part in ("--set", setting)]
        attack, defence, seed = cell
        done[cell] = {
            "attack": attack,
            "defence": defence,
            "seed": seed,
            "ok": True,
            "config": left[cell],
            "measured": key,
            "command": shlex.join(["foreshot", "run", preset, *keys]),
            **found,
        }
        runs = list(done.values())
        about = {"schema": 2, "preset": preset, "command": f"python claims/defences.py {preset}"}
        used = {run["measured"] for run in runs}
        told = {name: with_what for name, with_what in measured.items() if name in used}
        write_json(out, about | {"measured": told, "runs": runs})


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=SETTINGS)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--defences", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure at once")
    parser.add_argument("--threads", type=int, help="of torch, in each; a result depends on it")
    given = parser.parse_args()
    try:
        with with_threads(Workers(workers=given.workers, threads=given.threads).threads_here):
            asked = given.attacks, given.defences, given.seeds
            fill(given.preset, *asked, given.device, given.workers)
    except ForeshotError as error:
        print(f"defences: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
