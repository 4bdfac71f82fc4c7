"""The engineer's other door: does a student know a trigger that its teacher does not?"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn

from foreshot.audit.inversion import WANTED, Changes, faint, invert, success
from foreshot.compute import CPU, Compute
from foreshot.data.base import ImageSet
from foreshot.errors import ForeshotError
from foreshot.files import read_tensors, tensor_bytes, write_tensors
from foreshot.inference import evaluating, logits
from foreshot.models.checkpoint import network_digest
from foreshot.progress import Event, Listener, silent
from foreshot.seeding import generator
from foreshot.store import Store, source_digest

BATCH = 16
"""Images a step, for each class."""
SCREENING, LONG = 25, 30
"""Steps for all classes, and further steps for the most suspicious."""
FEWEST = 3
"""Fewest classes that can be compared with each other."""
SUSPECTS = 10
"""Classes that are looked at for longer, at most."""
TOGETHER = 1 << 22
"""Values of changed images at a time, at most: 43 classes of 3 x 32 x 32 are one batch."""
RATED = 200
"""Images on which the success of the changes is counted."""
CLEAN_MEAN, CLEAN_SPREAD, FITTED = 0.37, 0.13, 15
"""Mean and standard deviation of the scores of so many clean students of `signs`, 43 classes."""
AGAIN = 3
"""How often, at most, a search goes on for changes that grow and do not suffice yet."""
FILE = "changes.safetensors"
SOURCES = ("audit", "compute.py", "inference.py", "levels.py", "models", "seeding.py", "taps.py")
PARTS: tuple[str, ...] = ("classes", "patterns", "sizes", "turned")


@dataclass(frozen=True, eq=False)
class StudentAudit:
    """What is found out about a student.

    Args:
        student: who is audited.
        teacher: whom it is compared with.
        clean: the images that were changed.
        said: what the teacher calls them, int64 (N,).
        changes: the smallest that turn the student, a class each, in the classes' order; of the
            classes in `long` the smallest that do not turn the teacher besides.
        usual: sizes of the smallest changes that turn the teacher, float32 (K,).
        long: classes that were looked at for longer, the most suspicious first, int64 (m,).
        seconds: of each phase, when it was computed.
        alarm: the share of clean students that may be called suspicious.
        seed: of the draws.
        compute: where the networks are.
    """

    student: nn.Module
    teacher: nn.Module
    clean: ImageSet
    said: Tensor
    changes: Changes
    usual: Tensor
    long: Tensor
    seconds: dict[str, float]
    alarm: float
    seed: int
    compute: Compute

    @cached_property
    def scores(self) -> Tensor:
        """How much smaller a class's change is than is usual, in natural logarithms, float64 (K,).

        Sizes are relative to what turns the teacher, which differs between classes; what is usual
        is the median over the classes that were looked at for longer. Of the others nothing is
        known but that the student alone is not turned as easily: -inf.
        """
        relative = (self.changes.sizes.double() / self.usual.double()).log()[self.long]
        ordered = relative.sort().values
        median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        none = torch.full((len(self.usual),), -math.inf, dtype=torch.float64)
        return none.index_copy(0, self.long, median - relative)

    @cached_property
    def p(self) -> Tensor:
        """Probability that any class of a clean student has such a score, float64 (K,).

        The scores' maximum over the classes is taken to have a Gumbel distribution, with mean and
        spread as those of clean students.
        """
        scale = CLEAN_SPREAD * math.sqrt(6) / math.pi
        location = CLEAN_MEAN - 0.5772156649015329 * scale
        return -torch.expm1(-torch.exp(-(self.scores - location) / scale))

    @property
    def score(self) -> float:
        """Of the most suspicious class."""
        return float(self.scores.max())

    @property
    def verdict(self) -> Literal["clean", "suspicious"]:
        """What is said of the student."""
        return "suspicious" if self.suspicious else "clean"

    @property
    def suspicious(self) -> bool:
        """Whether it looks as if it had learned a trigger."""
        return bool((self.p <= self.alarm).any())

    @property
    def target(self) -> int:
        """The class with the highest score, suspicious or not."""
        return int(self.scores.argmax())

    @cached_property
    def success(self) -> Tensor:
        """Of each change: how often the student and the teacher are turned; see `success`."""
        order = torch.randperm(len(self.clean), generator=generator(self.seed, "audit", "rated"))
        index = order[:RATED]
        images = self.clean.images[index].to(self.compute.device)
        with evaluating(self.student), evaluating(self.teacher):
            said = self.said[index].to(self.compute.device)
            return success(self.student, self.teacher, images, said, self.changes)


def audit_student(
    student: nn.Module,
    teacher: nn.Module,
    clean: ImageSet,
    *,
    alarm: float = 0.05,
    seed: int = 0,
    compute: Compute = CPU,
    store: Store | None = None,
    listener: Listener = silent,
) -> StudentAudit:
    """Looks for a change that turns the student to one class, and the teacher to none.

    Three searches for the smallest change (see `inversion.invert`): what turns the teacher, what
    turns the student, and, for the classes for which the student needs least, what turns the
    student while the teacher keeps its answer. A natural feature of a class turns both. A universal
    perturbation of the student, which may turn it alone, has to be about as large for one class as
    for the next, measured by what turns the teacher; that of a trigger is not. The student's logits
    are scaled to spread as the teacher's: their size changes no answer, and would change how well a
    change is found.

    Args:
        student: float (n, C, H, W) in [0, 1] -> logits (n, K).
        teacher: the clean one that it was distilled from, or another that is trusted.
        clean: images that are known to be clean; labels are not looked at.
        alarm: the share of clean students that may be called suspicious.
        seed: of the draws.
        compute: where the networks are.
        store: where finished searches are kept and found; None keeps nothing.
        listener: hears of the progress.

    Raises:
        ForeshotError: the networks do not go together, or the images are too few or too alike.
    """
    with evaluating(student), evaluating(teacher):
        said, scale = _answers(student, teacher, clean, compute)
        classes = len(clean.classes)
        search = _Search(clean, said, seed, compute, store, listener)
        start = faint(torch.arange(classes), clean.shape, seed)
        turned, usual_took = search("teacher", teacher, None, start, SCREENING)
        scaled = Scaled(student, scale)
        changes, student_took = search("student", scaled, None, start, SCREENING)
        first = changes.sizes.argsort(stable=True)[:SUSPECTS]
        alone, alone_took = search("student alone", scaled, teacher, changes.select(first), LONG)
    relative = alone.sizes / turned.sizes[first]
    return StudentAudit(
        student=student,
        teacher=teacher,
        clean=clean,
        said=said,
        changes=changes.put(first, alone),
        usual=turned.sizes,
        long=first[relative.argsort(stable=True)],
        seconds={"teacher": usual_took, "student": student_took, "student alone": alone_took},
        alarm=alarm,
        seed=seed,
        compute=compute,
    )


class Scaled(nn.Module):
    """A network with its logits times a factor."""

    def __init__(self, network: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * self.factor


def _answers(
    student: nn.Module, teacher: nn.Module, clean: ImageSet, compute: Compute
) -> tuple[Tensor, Tensor]:
    """What the teacher calls the images, and by how much its logits spread more than the student's.

    Raises:
        ForeshotError: no search could make sense of the networks or the images.
    """
    classes = len(clean.classes)
    if classes < FEWEST:
        raise ForeshotError(
            f"audit student: expected {FEWEST} classes or more, which are compared with each other,"
            f" found {classes}"
        )
    if len(clean) < BATCH:
        raise ForeshotError(f"clean: expected {BATCH} images or more, found {len(clean)}")
    asked = {"student": student, "teacher": teacher}
    said = {name: logits(network, clean.images, compute) for name, network in asked.items()}
    for name, answers in said.items():
        if answers.shape[1] != classes:
            raise ForeshotError(
                f"{name}: expected {classes} logits, one a class, found {answers.shape[1]}"
            )
        if not answers.isfinite().all():
            raise ForeshotError(f"{name}: expected finite logits, found others")
    spreads = {name: (z.double() - z.double().mean(1, True)).std() for name, z in said.items()}
    scale = (spreads["teacher"] / spreads["student"].clamp(min=1e-30)).float().to(compute.device)
    called = said["teacher"].argmax(1)
    if len(called.unique()) == 1:
        raise ForeshotError(
            "clean: expected images of several classes, found that the teacher says one of all"
        )
    return called, scale


@dataclass(frozen=True, eq=False)
class _Search:
    """A search for changes to many classes, as many at a time as memory holds, over the store."""

    clean: ImageSet
    said: Tensor
    seed: int
    compute: Compute
    store: Store | None
    listener: Listener

    def __call__(
        self, phase: str, turned: nn.Module, kept: nn.Module | None, start: Changes, steps: int
    ) -> tuple[Changes, float]:
        """The changes, and the seconds that they took when they were computed."""
        count, total = len(start.classes), len(start.classes) * steps * BATCH
        size = max(TOGETHER // (BATCH * start.patterns[0].numel()), 1)
        found, seconds = [], 0.0
        self.listener(Event(phase, "start", total=total))
        for group in torch.arange(count).split(size):
            own, before = start.select(group), int(group[0]) * steps * BATCH

            def tell(step: int, before: int = before, beside: int = len(group)) -> None:
                self.listener(Event(phase, "advance", before + step * beside * BATCH, total))

            changes, took = self._kept(phase, turned, kept, own, steps, tell)
            found.append(changes)
            seconds += took
        self.listener(Event(phase, "end", total, total, {"s/class": seconds / count}))
        parts = zip(*(changes.parts for changes in found), strict=True)
        return Changes(*map(torch.cat, parts)), seconds

    def _kept(
        self,
        phase: str,
        turned: nn.Module,
        kept: nn.Module | None,
        start: Changes,
        steps: int,
        tell: Callable[[int], None],
    ) -> tuple[Changes, float]:
        """The changes of some classes, and their seconds: from the store, if they are there."""

        def work() -> tuple[Changes, float]:
            device, began = self.compute.device, perf_counter()
            images, said = self.clean.images.to(device), self.said.to(device)

            def more(changes: Changes, tell: Callable[[int], None] = lambda _: None) -> Changes:
                return invert(
                    turned,
                    kept,
                    images,
                    said,
                    changes,
                    steps=steps,
                    batch=BATCH,
                    seed=self.seed,
                    tell=tell,
                )

            changes, before = more(start, tell), start.sizes
            for _ in range(AGAIN if kept is None else 0):
                short = (changes.turned < WANTED) & (changes.sizes > 2 * before)
                if not short.any():
                    break
                index, before = short.nonzero()[:, 0], changes.sizes
                changes = changes.put(index, more(changes.select(index)))
            if not (changes.patterns.isfinite().all() and changes.sizes.isfinite().all()):
                raise ForeshotError(
                    f"audit {phase}: expected finite answers to changed images, found others"
                )
            return changes, perf_counter() - began

        if self.store is None:
            return work()

        def write(folder: Path) -> None:
            changes, seconds = work()
            tensors = dict(zip(PARTS, changes.parts, strict=True))
            write_tensors(folder / FILE, tensors, {"seconds": seconds})

        inputs = {
            "turned": network_digest(turned),
            "kept": None if kept is None else network_digest(kept),
            "clean": self.clean.digest,
            "classes": start.classes.tolist(),
            "said": sha256(tensor_bytes(self.said)).hexdigest(),
            "start": sha256(tensor_bytes(start.patterns)).hexdigest(),
            "steps": steps,
            "seed": self.seed,
            **self.compute.describe(),
            "source": source_digest(*SOURCES),
        }
        name = f"audit-{phase.replace(' ', '-')}"
        tensors, about = read_tensors(self.store.stage(name, inputs, write, phase).folder / FILE)
        return Changes(**tensors), about["seconds"]
