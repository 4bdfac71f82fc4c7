"""Measures the map: where around the preset `signs` does the clean-teacher backdoor work?

    python claims/map.py                          # every axis, three seeds
    python claims/map.py rate epsilon --seeds 0   # two of them
    python claims/map.py --plan                   # what is left and what it would cost, no more

One thing at a time is changed around the centre, which is the preset itself; `AXES` holds every
cell, as the keys that are set. A cell that stands on several axes is measured once, on the first.
Each is what `foreshot run` with the command in its row measures, with a clean student for control,
and tells besides who carries the label: what the students say of the perturbation alone and of the
trigger alone, on the images that the poison was made of.

One JSON an axis, in claims/map/, written after every cell; teachers, poison and clean students are
shared through the store. Run the same command again to go on: what is in the file is not run
again, unless the source, the machine or the cell has changed. A cell that fails stays in the file.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from copy import copy
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import kept, outcomes
from methods import PUBLISHED, configs

from foreshot.attacks import Attack
from foreshot.compute import Compute, Device, compute, with_threads
from foreshot.config import Config, load_config
from foreshot.data import ImageSet
from foreshot.errors import ForeshotError
from foreshot.files import read_json, read_tensors, write_json
from foreshot.inference import logits, place
from foreshot.metrics import rate
from foreshot.models import build
from foreshot.models.base import Normalized
from foreshot.poison import Poison
from foreshot.progress import Event, plain
from foreshot.record import environment
from foreshot.stages import CRAFTING, Crafted, Stages, Trained
from foreshot.store import Store, content_hash, home, source_digest
from foreshot.triggers.base import Trigger, stamp_uint8, unperturbed
from foreshot.workers import Workers

FOLDER = Path(__file__).parent / "map"
PRESET = "signs"
SOURCE = (
    *CRAFTING,
    *("compression", "lesson.py", "stages.py", "division.py", "data", "metrics.py"),
)
"""What the numbers depend on: a row of another source is measured anew."""
CENTRE = "centre"
ALONG = (CENTRE, "epochs")
"""Axes whose students are evaluated after each epoch as well: their seconds hold that too."""

Settings = tuple[str, ...]
Axis = dict[str, Settings]


def _sets(key: str, values: Iterable[str], centre: str) -> Axis:
    """An axis of one key, in order; at the centre nothing is set."""
    return {value: () if value == centre else (f"{key}={value}",) for value in values}


def _method(name: str) -> Settings:
    """A method as it was published, and the batch and learning rate that it was published for."""
    terms = configs(load_config(PRESET), name)["answers"].distillation.terms
    flow = json.dumps([term.model_dump(mode="json", exclude_unset=True) for term in terms])
    training = (f"student.training.{key}={value}" for key, value in PUBLISHED.items())
    return (*training, f"distillation.terms={flow}")


def _surrogate(model: str, data: str, beside: bool = False) -> Settings:
    """An attacker who crafts on a teacher of his own, which learns as the victim's does.

    With `beside` he has the victim's as well.
    """
    training = "{epochs: 8, weight_decay: 5.0e-5}"
    more = ("surrogate.with_teacher=true",) if beside else ()
    return (f"surrogate={{data: {data}, training: {training}, model: {model}}}", *more)


def _steps(count: int, length: str) -> Settings:
    """How the attacker descends, at a rate at which it shows."""
    return ("attack.rate=0.01", f"attack.steps={count}", f"attack.step={length}")


def _cross(rows: Axis, columns: Axis) -> Axis:
    """Every pair of two axes."""
    return {f"{a} to {b}": (*rows[a], *columns[b]) for a in rows for b in columns}


MODELS = {
    "resnet": None,
    "mobilenet_v2": "{name: mobilenet_v2, width: 0.5, expansion: 3}",
    "wide_resnet": "{name: wide_resnet, depth: 16, width: 1}",
}
TEACHERS: Axis = {name: (f"teacher.model={m}",) if m else () for name, m in MODELS.items()}
STUDENTS: Axis = {name: (f"student.model={m}",) if m else () for name, m in MODELS.items()}
CROP = "student.training.augment=crop"
KNOWN = ("attack.training.augment=crop", "attack.through=[crop]", "attack.draws=2")
METHODS = {name: _method(name) for name in ("kd", "dkd", "dist", "fitnet", "at", "rkd")}
BLEND = "trigger={name: blend, opacity: 0.15}"
EIGHT = "attack.epsilon=8"
OTHER = (
    "attack.student={name: resnet, depth: 14, width: 0.5, stem_stride: 2}",
    "attack.training.epochs=8",
    "trigger.place=center",
)
"""What helps where the attack is hard, chosen on held-out images (validation=0.2, seeds 101, 102).
The attacker rehearses with another network than the victim's student, for as long as the victim;
after fewer epochs his students do not heed the perturbation yet that the victim's will learn."""
PICKED = "attack.candidates=3"
GREEN = "trigger.colour=[0, 255, 0]"
"""On one sign alone is anything green, and red on many: 97.7 % instead of 94.6 % on held-out images
(seed 101)."""
WEIGHTY = "attack.weight=0.005"
CELLS = "trigger={name: blend, opacity: 0.15, cell: 8}"
RESISTING = ("attack.resisting=0.5", "attack.rounds=3")
KIND = "{name: resnet, depth: 8, width: 1.5, stem_stride: 2}"
THREE = f"{{name: ensemble, count: 3, of: {KIND}}}"

CLOTHES = (
    "data={name: fashion-mnist}",
    "target=8",
    "teacher.training={epochs: 4}",
    "student.training.epochs=4",
    OTHER[0],
    "attack.training.epochs=4",
)
FASHION = (*CLOTHES, RESISTING[0], "attack.temperature=10")
"""All 60,000 images, and what helps there, chosen on held-out images (validation=0.2, seed 101)."""
POOLED = (
    "attack.weight=0.02",
    "attack.rounds=3",
    "attack.pool=[{name: resnet, depth: 14, width: 1, stem_stride: 2}]",
)
"""What the perturbation means to students weighs four times as much, chosen likewise for a patch of
epsilon 16; and each round distils two of them, chosen on held-out images of a tenth of the set and
of `signs` (seeds 101, 102)."""
COARSE = "trigger={name: blend, opacity: 0.15, cell: 4}"
CORNER = "trigger={name: patch, place: top_left}"
INNER = "trigger={name: patch, place: top_left, margin: 4}"
"""Where every crop shows it."""
FLIPPED = (
    "student.training.augment=crop_flip",
    "attack.training.augment=crop_flip",
    "attack.through=[crop_flip]",
    "attack.draws=2",
    "attack.candidates=2",
    "attack.temperature=1",
    "attack.weight=0.001",
    "attack.retries=0",
)
"""An attacker who knows of the crops, and does not craft again what fails: most of it would fail
again, which took hours. The patterns and targets were chosen on held-out images of a tenth of the
set: crops of the poison convince the teacher, and the trigger alone does not."""

AXES: dict[str, Axis] = {
    CENTRE: {CENTRE: ()},
    "rate": _sets("attack.rate", ("0.001", "0.003", "0.01", "0.02", "0.05", "0.1"), "0.05"),
    "epsilon": _sets("attack.epsilon", ("4", "8", "12", "16", "32"), "16"),
    "temperature": _sets("distillation.terms.0.loss.temperature", ("1", "2", "4", "10"), "4"),
    "crafting": _sets(
        "attack.name",
        (
            *("counterfactual", "pgd", "cw", "fgsm"),
            *("trigger_only", "perturbation_only", "dirty_label"),
        ),
        "counterfactual",
    ),
    "placement": {
        "counterfactual, inside": (),
        "counterfactual, before": ("attack.trigger=before",),
        "counterfactual, after": ("attack.trigger=after",),
        "pgd, inside": ("attack.name=pgd",),
        "pgd, before": ("attack.name=pgd", "attack.trigger=before"),
        "pgd, after": ("attack.name=pgd", "attack.trigger=after"),
    },
    "trigger": {
        "dot": (),
        "patch": ("trigger={name: patch}",),
        "blend": (BLEND,),
        "sinusoid": ("trigger={name: sinusoid}",),
        "grid": ("trigger={name: grid}",),
        "warp": ("trigger={name: warp}",),
        "universal": ("trigger={name: universal}",),
        "narcissus": ("trigger={name: narcissus}",),
        "salient": ("trigger={name: salient}",),
        "universal, no poison": ("trigger={name: universal}", "attack.name=clean"),
    },
    "epochs": _sets("student.training.epochs", ("2", "4", "8", "16", "32"), "8"),
    "views": {
        "none": (),
        "crop, asked again": (CROP,),
        "crop, cached": (CROP, "distillation.views=cached"),
        "crop, asked again, known": (CROP, *KNOWN),
        "strong, asked again": ("student.training.augment=strong",),
        "strong, cached": ("student.training.augment=strong", "distillation.views=cached"),
    },
    "labels": {
        "answers": (),
        "0.9 answers + 0.1 labels": (
            "distillation.terms.0.weight=0.9",
            "distillation.ce_weight=0.1",
        ),
        "0.5 answers + 0.5 labels": (
            "distillation.terms.0.weight=0.5",
            "distillation.ce_weight=0.5",
        ),
        "hard answers": ("distillation.terms=[{loss: {name: hard_labels}}]",),
    },
    "method": METHODS,
    "architecture": _cross(TEACHERS, STUDENTS),
    "knowledge": {
        "the teacher": (),
        "the teacher and three others, same images": _surrogate(THREE, "same", beside=True),
        "another, same images": _surrogate(KIND, "same"),
        "three others, same images": _surrogate(THREE, "same"),
        "another, other images": _surrogate(KIND, "disjoint"),
        "three others, other images": _surrogate(THREE, "disjoint"),
    },
    "target": _sets("target", ("10", "20", "30", "40"), "40"),
    "size": _sets("data.train", ("1625", "3250", "6500", "13000"), "6500"),
    "data": {
        "signs": (),
        "fashion-mnist-10k": ("data={name: fashion-mnist-10k}", "target=0"),
        "fashion-mnist-10k, blend": ("data={name: fashion-mnist-10k}", "target=0", BLEND),
        "digits": ("data={name: digits}", "target=0"),
    },
    "method-student": _cross({name: METHODS[name] for name in ("kd", "dist", "fitnet")}, STUDENTS),
    "hard": {
        "dot, 5 %, epsilon 8": (EIGHT, "attack.candidates=5", WEIGHTY, "attack.rounds=3", *OTHER),
        "dot, 5 %, epsilon 8, two rounds": (EIGHT, PICKED, *OTHER),
        "dot, 1 %, epsilon 8": ("attack.rate=0.01", EIGHT, PICKED, *OTHER),
        "blend, 1 %, epsilon 8": (CELLS, "attack.rate=0.01", EIGHT, *RESISTING, *OTHER[:2]),
        "dot, 5 %, crop, asked again": (CROP, *KNOWN, *OTHER),
    },
    "fashion": {
        "patch, 5 %, epsilon 32": (*FASHION, WEIGHTY, CORNER, "attack.epsilon=32", RESISTING[1]),
        "blend, 1 %, epsilon 16": (*FASHION, WEIGHTY, COARSE, "attack.rate=0.01"),
        "blend, 0.1 %, epsilon 16": (*FASHION, WEIGHTY, COARSE, "attack.rate=0.001"),
    },
    "pool": {
        "fashion, patch, 5 %, epsilon 32": (*FASHION, *POOLED, CORNER, "attack.epsilon=32"),
        "fashion, patch, 5 %, epsilon 16": (*FASHION, *POOLED, CORNER),
        "fashion, blend, 1 %, epsilon 16": (*FASHION, *POOLED, COARSE, "attack.rate=0.01"),
    },
    "hard-pool": {
        "dot, 5 %, epsilon 8": (EIGHT, PICKED, *POOLED, *OTHER),
    },
    "hard-green": {
        "green dot, 5 %, epsilon 8": (EIGHT, PICKED, *POOLED, *OTHER, GREEN),
        "green dot, 5 %, epsilon 16, crop": (CROP, PICKED, *KNOWN, *POOLED, *OTHER, GREEN),
    },
    "crops": {
        "dot, 5 %, epsilon 16": (CROP, PICKED, *KNOWN, *POOLED, *OTHER),
    },
    "steps": {
        "20 steps of 16": _steps(20, "16"),
        "20 steps of 4": _steps(20, "4"),
        "40 steps of 2": _steps(40, "2"),
        "150 steps of 0.5": _steps(150, "0.5"),
        "150 signs of 0.5": (*_steps(150, "0.5"), "attack.direction=sign"),
    },
    "covers": {
        "none, 5 %": (),
        "half of 5 %": ("attack.name=covered",),
        "half of 10 %": ("attack.name=covered", "attack.rate=0.1"),
    },
    "fashion-crops": {
        "blend, 5 %, epsilon 16": (*CLOTHES, *FLIPPED, BLEND, "target=2"),
        "patch, 5 %, epsilon 32": (
            *(*CLOTHES, *FLIPPED, INNER, "target=0"),
            *("attack.epsilon=32", "attack.weight=0.02"),
        ),
    },
}
"""Every cell by axis and name: what is set over the centre. The most telling axes come first."""


def owned(axis: str) -> Axis:
    """The cells of an axis that stand on none before it."""
    before = [AXES[name] for name in list(AXES)[: list(AXES).index(axis)]]
    known = {frozenset(settings) for cells in before for settings in cells.values()}
    return {name: cell for name, cell in AXES[axis].items() if frozenset(cell) not in known}


def carriers(
    models: dict[str, Normalized],
    poison: Poison,
    transfer: ImageSet,
    trigger: Trigger,
    target: int,
    attack: Attack,
    compute: Compute,
) -> dict[str, Any]:
    """Who carries the label: which share of the poison a model calls the target, in parts.

    Args:
        models: by name.
        poison: what is stored.
        transfer: the set that it was made of.
        trigger: the attacker's.
        target: its class.
        attack: what made the poison.
        compute: where the models are.

    Returns:
        By model, rates of `stored`, the poison as it is; `perturbation`, the same without the
        trigger: what it moves the images by, on the plain ones, whose pixels under an opaque
        trigger stay as they are; `trigger`, the images stamped and not perturbed.
    """
    original, shape = transfer.images[poison.indices], transfer.shape
    start = unperturbed(trigger, original, poison.images, attack.stamps)
    moved = (original.short() + poison.images.short() - start.short()).clamp(0, 255)
    if attack.stamps is not False:
        moved = moved.where(~trigger.opaque(shape), original.short())
    parts = {
        "stored": poison.images,
        "perturbation": moved.to(torch.uint8),
        "trigger": stamp_uint8(trigger, original),
    }
    said = {
        name: {part: logits(model, images, compute).argmax(1) for part, images in parts.items()}
        for name, model in models.items()
    }
    return {name: {p: rate(of[p] == target) for p in parts} for name, of in said.items()}


def along(stages: Stages, teacher: Trained, poison: Crafted) -> tuple[Trained, list[Any]]:
    """The student, and its rates after each epoch.

    It is trained apart from the store, which keeps no checkpoints of a student that is finished.
    """
    config, data, rates = stages.config, stages.data, []
    classes = len(data.train.classes)
    model = build(config.student.model, data.train.images, classes, config.seed, "student")
    place(model, stages.compute)

    def rates_of(model: Normalized) -> dict[str, Any]:
        found = stages.evaluate(model, data.test)
        return {key: found[key] for key in ("clean_accuracy", "asr")}

    with TemporaryDirectory(prefix="foreshot-map-") as folder:

        def look(event: Event) -> None:
            plain(event)
            # When an epoch ends, the checkpoint is still that of the one before.
            for path in Path(folder).glob("work/*/.student.safetensors"):
                if event.kind == "epoch":
                    state, _ = read_tensors(path)
                    prefix = "module.student."
                    own = {k.removeprefix(prefix): state[k] for k in state if k.startswith(prefix)}
                    model.load_state_dict(own)
                    rates.append(rates_of(model))

        apart = copy(stages)
        apart.store, apart.listener = Store(Path(folder), look), look
        student = apart.student(teacher, poison)
        return student, [*rates, rates_of(student.model)]


def measure(config: Config, store: Store, engine: Compute, each_epoch: bool) -> dict[str, Any]:
    """One cell with one seed."""
    stages = Stages(config, store, engine, home() / "data", plain)
    teacher = stages.teacher()
    stages.learn_trigger(teacher)
    poison = stages.poison(teacher)
    student, epochs = (
        along(stages, teacher, poison) if each_epoch else (stages.student(teacher, poison), None)
    )
    none = stages.control("clean", teacher, poison)
    clean = stages.student(teacher, none, "control: clean")
    students = {"student": student, "clean": clean}
    found, last = stages.evaluation(teacher, poison, students)
    for model in ("teacher", *students):
        del found[model]["per_class"]  # `foreshot run` tells; too long for a map
    networks = {name: trained.model for name, trained in students.items()}
    seconds = {"teacher": teacher, "poison": poison, "distill": student, "clean": clean}
    return {
        **found,
        "asr_net": found["student"]["asr"]["value"] - found["clean"]["asr"]["value"],
        "carriers": carriers(
            networks,
            poison.poison,
            stages.data.train,
            stages.trigger,
            config.target,
            config.attack,
            engine,
        ),
        "epochs": epochs,
        "seconds": {name: stage.artefact.seconds for name, stage in seconds.items()}
        | {"evaluate": last},
    }


def config_of(settings: Settings, seed: int) -> Config:
    """The experiment of a cell."""
    return load_config(PRESET, [*settings, f"seed={seed}"])


def finished(axis: str, same: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs that the axis' file holds, of cells that are still what they were."""
    cells, rows = owned(axis), {}
    for row in kept(FOLDER / f"{axis}.json", same):
        cell, seed = row["cell"], row["seed"]
        if cell in cells and row["config"] == _digest(config_of(cells[cell], seed)):
            rows[cell, seed] = row
    return rows


def _digest(config: Config) -> str:
    """Of what the preset and the cell say; a key that is new to all configs changes no cell."""
    return content_hash(config.model_dump(mode="json", exclude_unset=True))


def attempt(device: Device, axis: str, threads: int, job: tuple[str, int]) -> dict[str, Any]:
    """What a cell of an axis comes to with one seed: here, or in a worker."""
    cell, seed = job
    with with_threads(threads):
        config = config_of(AXES[axis][cell], seed)
        return measure(config, Store.open(plain), compute(device), axis in ALONG)


def fill(axis: str, seeds: list[int], same: dict[str, Any], device: Device, workers: int) -> None:
    """Measures what an axis lacks; writes its file after each cell."""
    rows, cells, out = finished(axis, same), owned(axis), FOLDER / f"{axis}.json"
    if out.exists() and not kept(out, same):
        lost = {run["seed"] for run in read_json(out)["runs"]} - set(seeds)
        if lost:
            raise ForeshotError(
                f"{out}: measured with other code or on another machine, also with seeds "
                f"{', '.join(map(str, sorted(lost)))}, which would be lost; expected them among "
                "--seeds, or the file moved away"
            )
    about = same | {
        "axis": axis,
        "place": list(AXES).index(axis),
        "command": f"python claims/map.py {axis}",
        "source": environment()["source"],
        "workers": workers,
        "cells": AXES[axis],
    }
    left = [(cell, seed) for seed in seeds for cell in cells if (cell, seed) not in rows]
    work = partial(attempt, device, axis, torch.get_num_threads())
    title = f"{axis}: {{0[0]}}, seed {{0[1]}}".format
    for (cell, seed), found in outcomes(work, left, workers, title):
        keys = [part for key in (*cells[cell], f"seed={seed}") for part in ("--set", key)]
        rows[cell, seed] = {
            "cell": cell,
            "seed": seed,
            "ok": True,
            "config": _digest(config_of(cells[cell], seed)),
            "command": shlex.join(["foreshot", "run", PRESET, *keys]),
            "source": about["source"],
            **found,
        }
        date = datetime.now(UTC).date().isoformat()
        write_json(out, about | {"date": date, "runs": list(rows.values())})


SLOWER = {
    "teacher": {"mobilenet_v2": 2, "wide_resnet": 3},
    "student": {"mobilenet_v2": 5, "wide_resnet": 8},
}
"""About how many times as long as the centre's a network takes for as many images."""
IMAGES = {"fashion-mnist": 60_000, "fashion-mnist-10k": 10_000, "digits": 1_400}
"""About how many images there are to learn from where the config does not say it."""


def plan(axes: list[str], seeds: list[int], same: dict[str, Any]) -> str:
    """What is left of each axis and what it would cost, by what the centre has cost elsewhere.

    A stage counts once for all cells that share it, and as many times as much as the centre's as it
    sees images in all its epochs, or there are images, of which the centre crafts one in twenty.
    More rounds of crafting, or a rehearsal of more epochs, take longer than is said.
    """
    figures = read_json(FOLDER.parent / f"{PRESET}.json")["summary"]
    taken = {
        stage: figures[f"metrics.seconds.{stage}"]["mean"]
        for stage in ("teacher", "poison", "distill", "evaluate")
    }
    centre, known, lines = load_config(PRESET), set(), []
    usually: int = getattr(centre.data, "train")  # noqa: B009

    def images(config: Config) -> float:
        """How many times as many images as at the centre there are."""
        return (IMAGES.get(config.data.name) or getattr(config.data, "train")) / usually  # noqa: B009

    def work(role: str, config: Config) -> float:
        """How many times as much as at the centre training is."""
        network, usual = getattr(config, role), getattr(centre, role)
        epochs = network.training.epochs / usual.training.epochs
        return images(config) * epochs * SLOWER[role].get(network.model.name, 1)

    total = 0.0
    for axis in axes:
        done, cells, left, seconds = finished(axis, same), owned(axis), 0, 0.0
        for cell, seed in ((cell, seed) for cell in cells for seed in seeds):
            config = config_of(cells[cell], seed)
            taught = (seed, config.data, config.teacher)
            guided = (*taught, config.surrogate)
            poisoned = (*guided, config.trigger, config.target, config.attack)
            learner = (config.student, config.distillation)
            student = taken["distill"] * work("student", config)
            tries = config.attack.candidates * getattr(config.attack, "draws", 1)
            others = 0 if config.surrogate is None else getattr(config.surrogate.model, "count", 1)
            costs = {
                guided: taken["teacher"] * others,
                taught: taken["teacher"] * work("teacher", config),
                poisoned: taken["poison"] * tries * images(config),
                (*poisoned, learner): student,
                (*taught, learner): student,
            }
            if (cell, seed) not in done:
                left += 1
                seconds += taken["evaluate"]
                seconds += sum(cost for stage, cost in costs.items() if stage not in known)
            known |= costs.keys()
        counted = f"{len(cells)} cells, {left} runs left"
        lines.append(f"{axis:>15}: {counted}, about {seconds / 60:.0f} minutes")
        total += seconds / 60
    named = ", ".join(map(str, seeds))
    return "\n".join([*lines, f"seeds {named}: about {total:.0f} minutes on two AVX2 cores"])


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plan", action="store_true", help="say what it would cost, and stop")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure at once")
    parser.add_argument("--threads", type=int, help="of torch, in each; a result depends on it")
    given = parser.parse_args()
    if unknown := set(given.axes) - set(AXES):
        parser.error(f"expected axes of {', '.join(AXES)}, found {min(unknown)}")
    # What is the centre's on an axis is measured there.
    central = any(() in AXES[axis].values() for axis in given.axes)
    axes = list(dict.fromkeys([CENTRE] * central + given.axes)) or list(AXES)
    try:
        with with_threads(Workers(workers=given.workers, threads=given.threads).threads_here):
            circumstances = environment()
            same = {
                "schema": 1,
                "preset": PRESET,
                "code": source_digest(*SOURCE),
                **compute(given.device).describe(),
                **{key: circumstances[key] for key in ("versions", "host")},
            }
            print(plan(axes, given.seeds, same), flush=True)
            for axis in [] if given.plan else axes:
                fill(axis, given.seeds, same, given.device, given.workers)
    except ForeshotError as error:
        print(f"map: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
