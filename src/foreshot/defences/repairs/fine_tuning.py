"""Fine-tuning: distilled a little longer, on images that are trusted."""

from typing import Literal

from foreshot.defences.repairs.tuning import Tuning
from foreshot.models.base import Normalized
from foreshot.training import Training
from foreshot.views import DefenderView


class FineTuning(Tuning):
    """Distils the student further, on clean images alone (as in Liu et al., arXiv 1805.12185).

    With the clean teacher's answers this is the distillation again, without poison: the student
    forgets what nothing asks for any more.
    """

    name: Literal["fine_tuning"] = "fine_tuning"
    training: Training = Training(epochs=20, batch=32, lr=0.005, augment="crop")

    def mend(self, student: Normalized, view: DefenderView) -> None:
        self.tune(self.distiller(student, view), view)
