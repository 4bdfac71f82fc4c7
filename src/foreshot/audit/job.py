"""Audits from files to files: what `foreshot audit data` and `foreshot audit student` do."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from foreshot.audit.data import audit
from foreshot.audit.folder import check_apart, check_free, renew, taken
from foreshot.audit.reading import Wanted, read_set
from foreshot.audit.report import Report
from foreshot.audit.student import audit_student
from foreshot.audit.student_report import StudentReport
from foreshot.audit.teacher import Teacher, load_teacher
from foreshot.compute import Device, compute
from foreshot.defences import SCREENS, Combined, Screen
from foreshot.defences.conformal import DROP
from foreshot.defences.pool import Need
from foreshot.errors import ForeshotError, nearest
from foreshot.progress import Listener, silent
from foreshot.store import Store, home

AUDITS = Path("audits")
OPTIONS: dict[Need, str] = {
    "clean": "clean images (--clean), found none",
    "labels": "labels (--labels), found none",
    "second": "a second teacher (--second), found none",
    "student": "a student (--distil), found none",
}
"""What a screen may need that an option gives."""


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
        distil, alarm, drop, seed: see `foreshot.audit.data.audit`.
        broken: what to do about files that cannot be read.
        out: folder of the report; if None, audits/NAME with the name of the set.
        write_clean: folder for the kept subset.
        device: where to run.
    """

    source: Path
    teacher: Path
    out: Path | None = None
    architecture: str | None = None
    size: int = 224
    clean: Path | None = None
    second: Path | None = None
    labels: bool = False
    screens: tuple[str, ...] = ()
    distil: bool = False
    alarm: float = 0.05
    drop: float = DROP
    broken: Literal["skip", "refuse"] = "skip"
    write_clean: Path | None = None
    seed: int = 0
    device: Device = "auto"

    def run(self, listener: Listener = silent) -> Report:
        """Reads, screens and writes; scores of finished screens are found in the store."""
        source, real = self.source, self.source.resolve()
        out = self.out or AUDITS / (real.name if real.is_dir() else real.stem)
        sets = [source, *([self.clean] if self.clean else [])]
        given = {"teacher": self.teacher, "second": self.second, "clean": self.clean}
        paths = {what: path for what, path in given.items() if path is not None}
        check_apart(out, *sets)
        renew(out, source, *paths.values(), chosen=self.out is not None)
        screens = [self._screen(name) for name in self.screens]
        if self.distil and self.clean is None:
            raise ForeshotError("--distil: expected clean images (--clean), found none")
        if self.write_clean is not None:
            check_free(self.write_clean, out, *sets)
        engine = compute(self.device)
        teacher = load_teacher(self.teacher, self.architecture, self.size, engine)
        second = None
        if self.second is not None:
            second = load_teacher(self.second, None, self.size, engine, option=None)
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
            distil=self.distil,
            alarm=self.alarm,
            drop=self.drop,
            seed=self.seed,
            compute=engine,
            store=Store.open(listener),
            listener=listener,
        )
        # Another audit may have come first.
        with taken(out, source, *paths.values(), chosen=self.out is not None):
            report = Report(done, found, skipped, out, {"set": source, **paths})
            report.write()
        if self.write_clean is not None:
            report.write_clean(source, self.write_clean)
        return report

    def _screen(self, name: str) -> Screen:
        singles = [key for key, kind in SCREENS.items() if kind is not Combined]
        if name not in singles:
            raise ForeshotError(f"--screens: found {name!r}; {nearest(name, singles)}")
        given: dict[Need, object] = {
            "clean": self.clean,
            "labels": self.labels,
            "second": self.second,
            "student": self.distil,
        }
        for need in sorted(SCREENS[name].needs & given.keys()):
            if not given[need]:
                raise ForeshotError(f"screen {name}: expected {OPTIONS[need]}")
        return SCREENS[name].model_validate({})


@dataclass(frozen=True)
class StudentJob:
    """Which student to audit, and how.

    Args:
        student: a model file of foreshot's, or weights.
        teacher: the same, of its teacher.
        clean: a folder or file of clean images.
        out: folder of the report; if None, audits/NAME with the name of the student.
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
    out: Path | None = None
    student_architecture: str | None = None
    architecture: str | None = None
    size: int = 224
    alarm: float = 0.05
    broken: Literal["skip", "refuse"] = "skip"
    seed: int = 0
    device: Device = "auto"

    def run(self, listener: Listener = silent) -> StudentReport:
        """Reads, searches and writes; what was found before is taken from the store."""
        # The students of all runs are called the same; their folders are not.
        path = self.student.resolve()
        name = f"{path.parent.name}-student" if path.stem == "student" else path.stem
        out = self.out or AUDITS / name
        check_apart(out, self.clean)
        renew(out, self.student, self.teacher, self.clean, chosen=self.out is not None)
        engine = compute(self.device)
        teacher = load_teacher(self.teacher, self.architecture, self.size, engine)
        option = "--student-architecture"
        student = load_teacher(
            self.student, self.student_architecture, self.size, engine, option=option
        )
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
        paths = {"student": self.student, "teacher": self.teacher, "clean": self.clean}
        # Another audit may have come first.
        with taken(out, *paths.values(), chosen=self.out is not None):
            report = StudentReport(done, read.skipped, out, paths)
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
