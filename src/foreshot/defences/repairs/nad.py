"""Neural attention distillation: the student looks where a tuned copy of it looks."""

from copy import deepcopy
from typing import Literal, Self

from pydantic import Field, model_validator

from foreshot.augment import STRONG
from foreshot.defences.repairs.tuning import Tuning
from foreshot.distillation import AT, Term
from foreshot.models.base import Normalized
from foreshot.taps import stages
from foreshot.training import Training
from foreshot.views import DefenderView


class Nad(Tuning):
    """Tunes with the attention of a tuned copy, or of the teacher (Li et al., arXiv 2101.05930).

    L = answers + weight * sum over the stages of AT(student, guide), with attention maps of power
    2: `fine_tuning`, where the student has to look at what the guide looks at as well.

    Args:
        guide: `tuned` is a copy of the student, tuned first (as in the paper); `teacher` is the
            clean teacher, whose stages are compared with the student's, the last with the last.
        weight: beta; the paper's, of 500 to 1000 a stage, is for this mean over positions.
    """

    name: Literal["nad"] = "nad"
    guide: Literal["tuned", "teacher"] = "tuned"
    weight: float = Field(default=1000.0, ge=0)
    training: Training = Training(epochs=20, batch=32, lr=0.005, augment="crop")

    @model_validator(mode="after")
    def _guide_is_not_asked_for_answers(self) -> Self:
        if self.guide == "tuned" and self.training.augment in STRONG:
            raise ValueError(
                "with guide: tuned, training.augment has to be none, crop or crop_flip"
            )
        return self

    def mend(self, student: Normalized, view: DefenderView) -> None:
        guide = view.teacher
        if self.guide == "tuned":
            guide = deepcopy(student)
            self.tune(self.distiller(guide, view), view)
        # The last of one belongs to the last of the other, should one have more of them.
        pairs = list(zip(*(stages(n, self.title)[::-1] for n in (student, guide)), strict=False))
        terms = [Term(loss=AT(), weight=self.weight, at=pairs)]
        self.tune(self.distiller(student, view, terms, guide), view)
