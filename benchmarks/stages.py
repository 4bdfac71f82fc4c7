"""How fast each stage is, and how much of its time is not spent in the networks.

    python benchmarks/stages.py [PRESET] [--set KEY=VALUE] [--json FILE]

Every stage runs on a small part of the preset's data, with the preset's networks, batch sizes and
attack. The networks' calls are noted while it runs (shape, memory layout, mode, precision, with
which gradient), and the same calls are then replayed bare: forward and, where there was a gradient,
backward from a fixed gradient of the logits. Real and bare take turns in this one process, and

    time outside the networks = 1 - median(bare) / median(real).

"Outside" is thus everything else: batching, augmentation, losses, the optimizer, the attack's own
steps, stamping, rounding, metrics. Not measured: checkpoints (one an epoch) and the progress bar.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from foreshot.compute import Compute, compute
from foreshot.config import Config, load_config
from foreshot.data import ImageSet
from foreshot.distillation import Distiller
from foreshot.errors import ForeshotError
from foreshot.files import write_json
from foreshot.inference import logits, pixels, place
from foreshot.lesson import Lesson
from foreshot.metrics import evaluate
from foreshot.models import build
from foreshot.models.base import Normalized
from foreshot.progress import silent
from foreshot.record import environment
from foreshot.stages import EXAMPLE, Stages
from foreshot.store import Store, home
from foreshot.training import Samples, Supervised, fit
from foreshot.views import AttackerView

AIM = 0.15
"""The share of a stage's time that may pass outside the networks."""


@dataclass(frozen=True)
class Call:
    """How a network was called once."""

    network: nn.Module
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    training: bool
    autocast: bool
    gradient: str  # of the "weights", of the "input", or "none"


@dataclass(frozen=True)
class Job:
    """A stage's work on `images` images."""

    images: int
    work: Callable[[], object]


@contextmanager
def noting(device: torch.device) -> Iterator[list[Call]]:
    """Notes every call of a model, whoever makes it."""
    calls: list[Call] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(module, Normalized):
            return
        (x,) = inputs
        weights = any(p.requires_grad for p in module.parameters())
        gradient = "input" if x.requires_grad else "weights" if weights else "none"
        calls.append(
            Call(
                module,
                tuple(x.shape),
                x.stride(),
                module.training,
                torch.is_autocast_enabled(device.type),
                gradient if torch.is_grad_enabled() else "none",
            )
        )

    handle = register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def bare(calls: list[Call], compute: Compute) -> Callable[[], None]:
    """The same calls with nothing around them."""
    ready: dict[Call, Callable[[], None]] = {call: _replay(call, compute) for call in set(calls)}

    def work() -> None:
        for call in calls:
            ready[call]()

    return work


def _replay(call: Call, compute: Compute) -> Callable[[], None]:
    network = deepcopy(call.network).train(call.training)
    network.requires_grad_(call.gradient == "weights")
    x = torch.empty_strided(call.shape, call.stride, device=compute.device).uniform_()
    x.requires_grad_(call.gradient == "input")
    with torch.no_grad(), torch.autocast(compute.device.type, torch.bfloat16, call.autocast):
        upstream = torch.randn_like(network(x)) / len(x)
    parameters = [x] if call.gradient == "input" else list(network.parameters())

    def work() -> None:
        with (
            torch.set_grad_enabled(call.gradient != "none"),
            torch.autocast(compute.device.type, torch.bfloat16, call.autocast),
        ):
            y = network(x)
        if call.gradient != "none":
            torch.autograd.grad(y, parameters, upstream)

    return work


def seconds(work: Callable[[], object], compute: Compute) -> float:
    """Wall time of one go."""
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(job: Job, compute: Compute, repeats: int) -> dict[str, Any]:
    """Real and bare by turns, after one go of each to warm up."""
    with noting(compute.device) as calls:
        job.work()
    assert calls, "no model was called"
    alone = bare(calls, compute)
    alone()
    pairs = [(seconds(job.work, compute), seconds(alone, compute)) for _ in range(repeats)]
    real, networks = (median(column) for column in zip(*pairs, strict=True))
    shares = sorted(1 - b / a for a, b in pairs)
    return {
        "images": job.images,
        "calls": len(calls),
        "seconds": real,
        "bare_seconds": networks,
        "images_per_second": job.images / real,
        "outside": 1 - networks / real,
        "outside_min": shares[0],
        "outside_max": shares[-1],
    }


def jobs(config: Config, compute: Compute, steps: int, crafted: int) -> Iterator[tuple[str, Job]]:
    """The stages of a config, on `steps` batches of images and `crafted` crafted ones.

    One after another, as in an experiment: the teacher is trained until the next one is asked for.
    """
    data = Stages(config, Store(home() / "store"), compute, home() / "data", silent).data

    def model(images: Tensor, network: str) -> nn.Module:
        architecture = getattr(config, network).model
        built = build(architecture, images, len(data.train.classes), config.seed, network)
        return place(built, compute)

    def part(network: str) -> ImageSet:
        return data.train.select(torch.arange(len(data.train))[: steps * batch(network)])

    def batch(network: str) -> int:
        return getattr(config, network).training.batch

    def train(module: nn.Module, samples: Samples, network: str) -> Callable[[], None]:
        once = getattr(config, network).training.model_copy(update={"epochs": 1})
        return lambda: fit(module, samples, once, compute, seed=config.seed, stage=network)

    taught = part("teacher")
    assert taught.labels is not None
    teacher, student = model(taught.images, "teacher"), model(taught.images, "student")
    lesson = train(Supervised(teacher), Samples(taught.images, {"y": taught.labels}), "teacher")
    yield "teacher", Job(len(taught), lesson)

    # As many images as the attack crafts `crafted` of, so that choosing them weighs what it does.
    wanted = config.attack.wanted(len(data.train))
    share = min(1.0, crafted / (wanted * config.attack.candidates))
    count = max(1, int(wanted * share))
    update = {"count": count, "retries": 0, "confidence": 0.0}
    attack = config.attack.model_copy(update=update)
    transfer = data.train.images[: max(count, round(len(data.train) * share))]

    def craft() -> None:
        # What a teacher of a few steps never says is a target that leaves every image to attack.
        rarest = int(said.bincount(minlength=len(data.train.classes)).argmin())
        attack.craft(AttackerView(transfer, teacher, config.trigger, rarest, config.seed, compute))

    said = logits(teacher, transfer, compute).argmax(1)
    yield "poison", Job(min(math.ceil(count * config.attack.candidates), len(transfer)), craft)

    pupils = part("student")
    cached = config.distillation.views == "cached" or config.student.training.augment == "none"
    answers = logits(teacher, pupils.images, compute) if cached else None
    if cached:
        yield (
            "teacher's answers",
            Job(len(pupils), lambda: logits(teacher, pupils.images, compute)),
        )
    augment, views = config.student.training.augment, config.distillation.views
    lesson = Lesson(pupils, teacher, augment, views, answers=answers)
    distiller = Distiller(
        student,
        teacher,
        config.distillation.terms,
        config.distillation.ce_weight,
        example=pixels(pupils.images[:EXAMPLE].to(compute.device)),
        samples=len(pupils),
        seed=config.seed,
    )
    distill = train(distiller, lesson.samples(distiller, compute), "student")
    yield "distil", Job(len(pupils), distill)

    test = data.test.select(torch.arange(len(data.test))[: 4 * len(pupils)])
    assert test.labels is not None
    shown = len(test) + int((test.labels != config.target).sum())
    yield (
        "evaluate",
        Job(
            shown,
            lambda: evaluate(student, test, config.trigger, config.target, compute),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="signs", metavar="PRESET|FILE.yaml")
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--steps", type=int, default=10, help="batches of a training stage")
    parser.add_argument("--crafted", type=int, default=256, help="images to craft")
    parser.add_argument("--repeats", type=int, default=5, help="turns; at least 5 to be quoted")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()

    config = load_config(given.preset, given.settings)
    engine = compute(given.device, config.precision)
    stages = {}
    print(f"{given.preset}: {torch.get_num_threads()} threads, {engine.describe()}")
    print(f"{'stage':18} {'images':>8} {'images/s':>10} {'outside the networks':>28}")
    for name, job in jobs(config, engine, given.steps, given.crafted):
        found = stages[name] = measure(job, engine, given.repeats)
        spread = f"({found['outside_min']:.1%} to {found['outside_max']:.1%})"
        print(
            f"{name:18} {found['images']:8,} {found['images_per_second']:10,.0f} "
            f"{found['outside']:8.1%} {spread:19}{'' if found['outside'] <= AIM else ' > 15 %'}",
            flush=True,
        )
    if given.json:
        write_json(
            given.json,
            {
                "schema": 1,
                "preset": given.preset,
                "settings": given.settings,
                "config": config.model_dump(mode="json"),
                "steps": given.steps,
                "repeats": given.repeats,
                "stages": stages,
                "date": datetime.now(UTC).date().isoformat(),
                **engine.describe(),
                **environment(),
            },
        )


if __name__ == "__main__":
    try:
        main()
    except ForeshotError as error:
        print(f"stages: {error}", file=sys.stderr)
        sys.exit(2)
