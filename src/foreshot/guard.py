"""What the defender of an experiment does: to the set, the distillation, the student, its inputs.

Like the stages, each step computes one artefact over the store; what a defence can see is its view.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from foreshot.compression.base import trainable
from foreshot.data import ImageSet
from foreshot.defences import (
    SCREENING,
    Defence,
    Distilling,
    Monitor,
    OwnTeacher,
    Repair,
    Screen,
    Verdict,
    judge,
)
from foreshot.defences.pool import Need, halved
from foreshot.defences.scoring import watched
from foreshot.errors import ForeshotError
from foreshot.files import write_json
from foreshot.lesson import Beside, Lesson
from foreshot.models.checkpoint import save_model
from foreshot.progress import Event, Listener
from foreshot.seeding import derived
from foreshot.stages import Crafted, Stages, Trained
from foreshot.store import Artefact, content_hash, source_digest
from foreshot.training import TRAINING
from foreshot.views import DefenderView

SECOND = "second_teacher"
GUARDING = (*SCREENING, "guard.py", "poison.py")
"""Sources that screens and monitors of an experiment run."""
DEFENDING = (
    *(*TRAINING, *GUARDING, "distillation", "lesson.py", "compression/base.py"),
    *("audit/inversion.py", "audit/student.py", "attacks/folding.py"),
)
"""Sources that other defences run."""


@dataclass(frozen=True, eq=False)
class Screened:
    """What a screen concludes of a transfer set: the student gets what it keeps.

    Args:
        artefact: `screen.safetensors` and `screen.json`.
        verdict: the scores, and what is removed.
        student: distilled for the screen to look at; None if it does not.
        teachers: the second one, trained for it; empty if it asks none.
    """

    artefact: Artefact
    verdict: Verdict
    student: Trained | None
    teachers: Mapping[str, Trained]

    @property
    def key(self) -> dict[str, Any]:
        return {"kept": content_hash(self.verdict.kept.tolist())}

    @property
    def seconds(self) -> float:
        """What it took when it was computed, with the student that it looks at."""
        return self.artefact.seconds + (self.student.artefact.seconds if self.student else 0)

    def __call__(self, lesson: Lesson) -> Lesson:
        return lesson.select(self.verdict.kept)


@dataclass(frozen=True, eq=False)
class Changed:
    """What a defence in distillation makes of a lesson.

    The defence sees the images as its view has them, without labels that it may not look at. What
    the attacker dictates would be the poison's places; so would the answers that are known, since
    those to the poison were asked for apart and differ from others in their last bits.

    Args:
        defence: the defence.
        see: gives what it knows; only asked where a student is distilled.
        key: what that depends on.
    """

    defence: Distilling
    see: Callable[[], DefenderView]
    key: dict[str, Any]

    def __call__(self, lesson: Lesson) -> Lesson:
        view = self.see()
        shown = replace(lesson, data=view.transfer, dictated=None, answers=None)
        changed = self.defence.change(shown, view)
        if changed.weights is not None and not changed.weights.any():
            raise ForeshotError(
                f"defence {self.defence.title}: expected images to distil on, "
                f"found that all {len(lesson.data)} weigh nothing"
            )
        data = replace(changed.data, labels=lesson.data.labels)
        return replace(changed, data=data, dictated=lesson.dictated)


@dataclass(frozen=True, eq=False)
class Guarded:
    """A student, and what the defence did for it.

    Args:
        student: as it is used.
        undefended: as it was before a repair; or the one that screens looked at, of the whole set
            and the clean images that are scored beside it.
        screened: what a screen concluded of its transfer set.
        mended: whether a repair has made `student` of `undefended`.
        teachers: those that the defence trained, by the name of their seconds.
        seconds: what the defence took when it was computed, without `teachers` and the student.
    """

    student: Trained
    undefended: Trained | None = None
    screened: Screened | None = None
    mended: bool = False
    teachers: Mapping[str, Trained] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def distilled(self) -> Trained:
        """The student as the distillation left it."""
        return self.undefended if self.mended and self.undefended else self.student

    @property
    def files(self) -> list[Path]:
        """What a screen leaves."""
        kept = self.screened.artefact if self.screened else None
        return [kept.folder / name for name in kept.digests] if kept else []


class Guard:
    """The defender of an experiment, with the defence of its config; without one it does nothing.

    Args:
        stages: the experiment's.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages, self.config = stages, stages.config

    def student(self, teacher: Trained, poison: Crafted, label: str = "student") -> Guarded:
        """A student, distilled on the transfer set with the poison in it, and defended.

        Args:
            teacher: whom it learns from.
            poison: what lies in the set; the defence sees the set alone.
            label: what the listener calls it.
        """
        match self.config.defence:
            case Screen():
                screened = self.screen(teacher, poison, label)
                student = self.stages.student(teacher, poison, label, screened)
                return Guarded(
                    student,
                    screened.student,
                    screened,
                    teachers=screened.teachers,
                    seconds=screened.seconds,
                )
            case Distilling() as defence:
                return self._taught_otherwise(defence, teacher, poison, label)
            case Repair() as repair:
                return self._mended(repair, teacher, poison, label)
            case _:
                return Guarded(self.stages.student(teacher, poison, label))

    def watch(
        self, teacher: Trained, poison: Crafted, student: Trained, label: str = "student"
    ) -> Artefact:
        """What a monitor makes of the inputs of a student, in `watch.json`.

        Args:
            teacher: whom the student has learned from.
            poison: what lay in its set.
            student: the student.
            label: what the listener calls it.
        """
        monitor, stages, title = self.config.defence, self.stages, _title("monitor", label)
        assert isinstance(monitor, Monitor)

        def work(folder: Path) -> None:
            view = self._view(title, teacher, poison, student)
            test, trigger, target = stages.data.test, stages.trigger, self.config.target
            write_json(folder / "watch.json", watched(monitor, view, test, trigger, target))

        inputs = stages.inputs(
            (*GUARDING, "metrics.py", "triggers", "data/files.py"),
            test=stages.digests["test"],
            **stages.stamped(),
            **self._known(teacher, poison, student),
        )
        return stages.store.stage("watch", inputs, work, title)

    def screen(self, teacher: Trained, poison: Crafted, label: str = "student") -> Screened:
        """What a screen concludes of the transfer set with the poison in it; see `student`."""
        stages, defender, title = self.stages, self.config.defender, _title("screen", label)
        screen = self.config.defence
        assert isinstance(screen, Screen)
        undefended, teachers = self._helped(screen, teacher, poison, title)
        second = teachers.get(SECOND)

        def work(folder: Path) -> None:
            stages.listener(Event(title, "start"))
            view = self._view(title, teacher, poison, undefended, second, both=True)
            rule = defender.model_dump(include={"drop", "level", "remove"})
            verdict = judge(screen, view, **rule)
            if not len(verdict.kept):
                raise ForeshotError(
                    f"defence {screen.title}: expected images to distil on, "
                    f"found all {len(verdict.p)} removed"
                )
            verdict.save(folder / "screen.safetensors")
            about = {
                "defence": screen.title,
                "images": len(verdict.p),
                "removed": len(verdict.flagged),
                "suspected_target": verdict.target,
                "calibrated": verdict.calibrated,
                "ranked": verdict.ranked.tolist(),
            }
            write_json(folder / "screen.json", about)
            stages.listener(Event(title, "end"))

        inputs = stages.inputs(GUARDING, **self._known(teacher, poison, undefended, second))
        artefact = stages.store.stage("screen", inputs, work, title)
        verdict = Verdict.load(artefact.folder / "screen.safetensors")
        return Screened(artefact, verdict, undefended, teachers)

    def _taught_otherwise(
        self, defence: Distilling, teacher: Trained, poison: Crafted, label: str
    ) -> Guarded:
        stages, title = self.stages, _title("lesson", label)
        undefended, teachers = self._helped(defence, teacher, poison, title)
        second = teachers.get(SECOND)
        if isinstance(defence, OwnTeacher):
            teachers["own_teacher"] = teacher = stages.taught(
                self.config.teacher,
                "own teacher",
                stages.parts.taught,
                defence.supervised,
                defence=defence.model_dump(mode="json"),
                defending=source_digest(*DEFENDING),
            )
        known = self._known(teacher, poison, undefended, second)
        known["defending"] = source_digest(*DEFENDING)
        see = partial(self._view, title, teacher, poison, undefended, second, both=True)
        change = Changed(defence, see, {"change": known})
        return Guarded(
            stages.student(teacher, poison, label, change),
            undefended,
            teachers=teachers,
            seconds=undefended.artefact.seconds if undefended else 0.0,
        )

    def _mended(self, repair: Repair, teacher: Trained, poison: Crafted, label: str) -> Guarded:
        stages, title = self.stages, _title("repair", label)
        student = stages.student(teacher, poison, label)

        def work(folder: Path) -> None:
            model = trainable(student.model)
            repair.mend(model, self._view(title, teacher, poison, student))
            loaded = student.loaded
            architecture, shape, classes = loaded.architecture, loaded.shape, loaded.classes
            save_model(folder / "model.safetensors", model, architecture, shape, classes)

        inputs = stages.inputs(DEFENDING, **self._known(teacher, poison, student))
        mended = stages.trained(stages.store.stage("repair", inputs, work, title))
        return Guarded(mended, student, mended=True, seconds=mended.artefact.seconds)

    def _helped(
        self, defence: Defence, teacher: Trained, poison: Crafted, title: str
    ) -> tuple[Trained | None, dict[str, Trained]]:
        """What a defence of the set asks for before there is a student.

        Returns:
            A student to look at, and a second teacher, by the name of its seconds; neither if the
            defence does not ask for it.
        """
        stages, student, teachers = self.stages, None, dict[str, Trained]()
        there: dict[Need, object] = {
            "clean": stages.parts.clean,
            "labels": self.config.defender.labels,
        }
        asked = defence.uses(frozenset(need for need, thing in there.items() if not thing))
        if "student" in asked:
            clean, beside = stages.parts.clean, None
            if clean is not None:
                beside = Beside(halved(clean, self._seed)[1])
            student = stages.student(teacher, poison, f"student for the {title}", beside)
        if "second" in asked:
            network, data = self.config.teacher, stages.parts.taught
            teachers[SECOND] = stages.taught(network, "second teacher", data)
        return student, teachers

    @property
    def _seed(self) -> int:
        """The defender's; from the experiment's own follows which images the attacker takes."""
        return derived(self.config.seed, "defender")

    def _view(
        self,
        label: str,
        teacher: Trained,
        poison: Crafted,
        student: Trained | None = None,
        second: Trained | None = None,
        *,
        both: bool = False,
    ) -> DefenderView:
        """What the defender sees; `both` says that the student is one of `_helped`."""
        stages, labels, clean = self.stages, self.config.defender.labels, self.stages.parts.clean

        def seen(part: ImageSet) -> ImageSet:
            return part if labels else replace(part, labels=None)

        return DefenderView(
            transfer=seen(poison.poison.apply(stages.data.train)),
            teacher=teacher.model,
            student=student and student.model,
            clean=clean and seen(clean),
            seed=self._seed,
            compute=stages.compute,
            listener=_retitled(stages.listener, label),
            second=second and second.model,
            both=both,
        )

    def _known(
        self,
        teacher: Trained,
        poison: Crafted,
        student: Trained | None = None,
        second: Trained | None = None,
    ) -> dict[str, Any]:
        """What the view, and so the defence, depends on."""
        defence = self.config.defence
        return {
            "data": self.stages.digests["train"],
            "clean": self.stages.digests.get("clean"),
            "teacher": teacher.artefact.digest,
            "poison": poison.poison.digest,
            "student": student and student.artefact.digest,
            "second": second and second.artefact.digest,
            "defence": defence and defence.model_dump(mode="json"),
            "defender": self.config.defender.model_dump(mode="json"),
        }


def _retitled(listener: Listener, label: str) -> Listener:
    """Tells of all events as of one stage. A defence that looked into it would find no secret."""
    return lambda event: listener(replace(event, stage=label))


def _title(kind: str, label: str) -> str:
    """What the listener calls the work on a student."""
    return kind if label == "student" else f"{kind} of {label}"
