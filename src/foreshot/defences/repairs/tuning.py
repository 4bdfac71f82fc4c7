"""What repairs that train share: a lesson of clean images, and who answers in it."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import nn

from foreshot.augment import STRONG
from foreshot.defences.pool import Need, there
from foreshot.defences.repairs.base import Repair
from foreshot.distillation import KD, Distiller, Term
from foreshot.errors import ForeshotError
from foreshot.models.base import Normalized
from foreshot.training import Samples, Training, fit
from foreshot.views import DefenderView


class Tuning(Repair):
    """A repair that trains on the defender's clean images.

    Args:
        labels: who says what they show: the trusted `teacher`, whose probabilities (KD at
            temperature 4) need no labels, or whoever `given` the set its labels
            (`defender.labels`).
        training: the schedule; its epochs are passes over the clean images.
    """

    labels: Literal["teacher", "given"] = "teacher"
    training: Training

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"clean", "labels"} if self.labels == "given" else {"clean"})

    @abstractmethod
    def mend(self, student: Normalized, view: DefenderView) -> None: ...

    def distiller(
        self,
        student: nn.Module,
        view: DefenderView,
        terms: Sequence[Term] = (),
        guide: nn.Module | None = None,
    ) -> Distiller:
        """The student and who answers, as a module that `tune` can train.

        Args:
            student: what is trained.
            view: what the defender knows.
            terms: what else there is to learn than the answers.
            guide: whose features these compare with; the teacher if None.
        """
        answers = [Term(loss=KD())] if self.labels == "teacher" else []
        given = float(self.labels == "given")
        return Distiller(student, guide or view.teacher, [*answers, *terms], given)

    def tune(self, module: nn.Module, view: DefenderView, ask: bool = True) -> None:
        """Trains those parameters of a module that may be trained, on the clean images.

        Args:
            module: takes images and either `teacher_logits` or labels `y`, as a `Distiller` does.
            view: what the defender knows.
            ask: whether the module takes the teacher's answers to the images, where it may answer.

        Raises:
            ForeshotError: labels are to be given, and are not.
        """
        clean, augment = there(view.clean), self.training.augment
        targets, asked = {}, None
        if self.labels == "given":
            if clean.labels is None:
                raise ForeshotError(
                    f"defence {self.title}: expected a clean set with labels, found none"
                )
            targets["y"] = clean.labels
        elif ask and augment not in STRONG:
            asked = view.teacher
        fit(
            module,
            Samples(clean.images, targets, asked),
            self.training,
            view.compute,
            seed=view.seed,
            stage=f"repair {self.title}",
            listener=view.listener,
        )
