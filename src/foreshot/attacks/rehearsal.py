"""What attacks have in common that distil students of their own first."""

from dataclasses import replace

from pydantic import Field

from foreshot.attacks.base import Attack
from foreshot.attacks.surrogate import surrogate
from foreshot.models import AnyArchitecture, ResNet
from foreshot.poison import Poison
from foreshot.training import Training
from foreshot.views import AttackerView


class Rehearsal(Attack):
    """An attack that distils surrogate students, and crafts with what they have learned.

    The first is distilled on the clean set, that of each further round on the poison of the round
    before; all of them are heeded.

    Args:
        rounds: of distilling a surrogate and crafting.
        student: architecture of the surrogates; the attacker need not know the victim's.
        training: how they are distilled, at a temperature of 4.
    """

    rounds: int = Field(default=1, ge=1, le=20)
    student: AnyArchitecture = ResNet(depth=8)
    training: Training = Training(epochs=4)

    def craft(self, view: AttackerView) -> Poison:
        view = replace(view, teacher_logits=view.answers())
        poison = None
        for number in range(self.rounds):
            student = surrogate(view, self.student, self.training, poison, number + 1)
            view = replace(view, students=(*view.students, student))
            # Only what is stored has to convince every time; the rest teaches a surrogate.
            retries = self.retries if number + 1 == self.rounds else 0
            poison = Attack.craft(self.model_copy(update={"retries": retries}), view)
        assert poison is not None  # there is one round or more
        return poison
