"""The pattern that teacher and student have in common."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from foreshot.triggers.learned import Effect, Rehearsed
from foreshot.triggers.universal import Universal

if TYPE_CHECKING:
    from foreshot.views import AttackerView


class Shared(Rehearsed):
    """The pattern that leads teacher and student to the target (Chen et al., arXiv 2509.23871).

    Minimises the mean of CE(f(x'), target) + CE(S(x'), target), for a student S that the attacker
    distils on the clean set: the trigger that SCAR finds before it turns to the teacher. The paper
    bounds what is added by its L-inf norm, which is here the opacity.
    """

    name: Literal["shared"] = "shared"  # type: ignore[assignment]

    def effect(self, view: "AttackerView") -> Effect:
        networks = view.teacher, self.rehearsed(view)
        teacher, student = (Universal().effect(replace(view, teacher=n)) for n in networks)
        return lambda x, stamped: teacher(x, stamped) + student(x, stamped)
