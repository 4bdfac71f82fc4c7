"""The pattern that teacher and student have in common."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from foreshot.models import AnyArchitecture, ResNet
from foreshot.training import Training
from foreshot.triggers.learned import Effect
from foreshot.triggers.universal import Universal

if TYPE_CHECKING:
    from foreshot.views import AttackerView


class Shared(Universal):
    """The pattern that leads teacher and student to the target (Chen et al., arXiv 2509.23871).

    Minimises the mean of CE(f(x'), target) + CE(S(x'), target), for a student S that the attacker
    distils on the clean set: the trigger that SCAR finds before it turns to the teacher. The paper
    bounds what is added by its L-inf norm, which is here the opacity.

    Args:
        student: architecture of that student; the attacker need not know the victim's.
        training: how it is distilled.
    """

    name: Literal["shared"] = "shared"  # type: ignore[assignment]
    student: AnyArchitecture = ResNet(depth=8)
    training: Training = Training(epochs=4)

    def effect(self, view: "AttackerView") -> Effect:
        from foreshot.attacks.surrogate import surrogate  # attacks knows triggers

        student = surrogate(view, self.student, self.training)
        of_teacher, of_student = (
            super().effect(view),
            super().effect(replace(view, teacher=student)),
        )

        def both(x: Tensor, stamped: Tensor) -> Tensor:
            return of_teacher(x, stamped) + of_student(x, stamped)

        return both
