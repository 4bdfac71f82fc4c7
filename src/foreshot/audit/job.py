"""Audits from files to files: what `foreshot audit data` and `foreshot audit student` do."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from foreshot.audit.data import audit
from foreshot.audit.reading import Wanted, read_set
from foreshot.audit.report import Report, check_apart, check_free
from foreshot.audit.student import audit_student
from foreshot.audit.student_report import StudentReport
from foreshot.audit.teacher import Teacher, load_teacher
from foreshot.compute import Device, compute
from foreshot.defences import SCREENS, Combined, Screen
from foreshot.defences.conformal import DROP
from foreshot.errors import ForeshotError, nearest
from foreshot.progress import Listener, silent
from foreshot.store import Store, home


@dataclass(frozen=True)
class Job:
    """What to audit, and how.

    Args:
        source: a folder of pictures, or a safetensors file.
        teacher: a model file of foreshot's, or weights.
        architecture: of the weights, see `load_teacher`.
        size: side of the images that such a network is given, in pixels.
        clean: a folder or file of clean images.
        second: a second teacher, a model file of foreshot's.
        labels: whether to compare the labels of both sets with the teacher's answers.
        screens: names; none stands for all that can be had.
        alarm, drop, seed: see `foreshot.audit.data.audit`.
        broken: what to do about files that cannot be read.
        out: folder of the report.
        write_clean: folder for the kept subset.
        device: where to run.
    """

    source: Path
    teacher: Path
    out: Path
    architecture: str | None = None
    size: int = 224
    clean: Path | None = None
    second: Path | None = None
    labels: bool = False
    screens: tuple[str, ...] = ()
    alarm: float = 0.05
    drop: float = DROP
    broken: Literal["skip", "refuse"] = "skip"
    write_clean: Path | None = None
    seed: int = 0
    device: Device = "auto"

    def run(self, listener: Listener = silent) -> Report:
        """Reads, screens and writes; scores of finished screens are found in the store."""
        screens = [_screen(name) for name in self.screens]
        check_apart(self.out, self.source, *([self.clean] if self.clean else []))
        if self.write_clean is not None:
            check_free(self.source, self.write_clean, self.out)
        engine = compute(self.device)
        teacher = load_teacher(self.teacher, self.architecture, self.size, engine)
        second = None
        if self.second is not None:
            second = load_teacher(self.second, None, self.size, engine)
            teacher = alike(self.second, second, teacher)
        wanted = Wanted(
            shape=teacher.shape,
            classes=teacher.classes,
            labels=self.labels,
            refuse=self.broken == "refuse",
            cache=home() / "data",
            listener=listener,
        )
        found = read_set(self.source, wanted)
        clean, skipped = None, dict(found.skipped)
        if self.clean is not None:
            read = read_set(self.clean, replace(wanted, stage="read clean"))
            clean = read.images
            skipped |= {str(self.clean / name): why for name, why in read.skipped.items()}
        done = audit(
            found.images,
            teacher.model,
            clean=clean,
            second=None if second is None else second.model,
            screens=screens or None,
            alarm=self.alarm,
            drop=self.drop,
            seed=self.seed,
            compute=engine,
            store=Store.open(listener),
            listener=listener,
        )
        report = Report(done, found, skipped, self.out)
        report.write()
        if self.write_clean is not None:
            report.write_clean(self.source, self.write_clean)
        return report


@dataclass(frozen=True)
class StudentJob:
    """Which student to audit, and how.

    Args:
        student: a model file of foreshot's, or weights.
        teacher: the same, of its teacher.
        clean: a folder or file of clean images.
        out: folder of the report.
        student_architecture, architecture: of the student's and the teacher's weights, see
            `load_teacher`.
        size: side of the images that such networks are given, in pixels.
        alarm, seed: see `foreshot.audit.student.audit_student`.
        broken: what to do about files that cannot be read.
        device: where to run.
    """

    student: Path
    teacher: Path
    clean: Path
    out: Path
    student_architecture: str | None = None
    architecture: str | None = None
    size: int = 224
    alarm: float = 0.05
    broken: Literal["skip", "refuse"] = "skip"
    seed: int = 0
    device: Device = "auto"

    def run(self, listener: Listener = silent) -> StudentReport:
        """Reads, searches and writes; what was found before is taken from the store."""
        check_apart(self.out, self.clean)
        engine = compute(self.device)
        teacher = load_teacher(self.teacher, self.architecture, self.size, engine)
        student = load_teacher(self.student, self.student_architecture, self.size, engine)
        teacher = alike(self.student, student, teacher)
        wanted = Wanted(
            shape=teacher.shape,
            classes=teacher.classes,
            refuse=self.broken == "refuse",
            cache=home() / "data",
            listener=listener,
            stage="read clean",
        )
        read = read_set(self.clean, wanted)
        done = audit_student(
            student.model,
            teacher.model,
            read.images,
            alarm=self.alarm,
            seed=self.seed,
            compute=engine,
            store=Store.open(listener),
            listener=listener,
        )
        report = StudentReport(done, read.skipped, self.out)
        report.write()
        return report


def alike(path: Path, other: Teacher, teacher: Teacher) -> Teacher:
    """The teacher, with the classes' names from whichever of two networks brings them along.

    Args:
        path: where the other comes from.
        other: another network.
        teacher: the teacher.

    Raises:
        ForeshotError: they take other images, or say other classes.
    """
    expected, found = (f"{n.shape} images and {len(n.classes)} classes" for n in (teacher, other))
    if teacher.named and other.named and other.classes != teacher.classes:
        found += " of other names"
    if found != expected:
        raise ForeshotError(f"{path}: expected {expected} as the teacher's, found {found}")
    return teacher if teacher.named else replace(teacher, classes=other.classes)


def _screen(name: str) -> Screen:
    singles = [key for key, kind in SCREENS.items() if kind is not Combined]
    if name not in singles:
        raise ForeshotError(f"--screens: found {name!r}; {nearest(name, singles)}")
    return SCREENS[name].model_validate({})
