"""Crafting that leaves a student nothing to learn but the trigger."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.base import Problem
from foreshot.attacks.eot import Change, Eot, same
from foreshot.attacks.surrogate import surrogate
from foreshot.models import AnyArchitecture, ResNet
from foreshot.poison import Poison
from foreshot.training import Training
from foreshot.transforms import Transform
from foreshot.views import AttackerView


class Counterfactual(Eot):
    """PGD against the teacher, whose perturbation surrogate students do not heed (foreshot's own).

    A student that learns the perturbation itself needs no trigger. So the attacker distils
    students of the same teacher first, and minimises, with logits z centred over the classes,

        CE(f(x) / T, target) + weight * mean over surrogates S of ||z_S(x) - z_S(start)||^2:

    the teacher says target and, to a student, nothing has happened but the trigger. The first
    surrogate is distilled on the clean set, that of each further round on the poison of the
    round before; all of them are heeded. If the image is changed on its way (`through`), both terms
    are means over the changes.

    Args:
        weight: of the penalty; a large one costs the teacher's confidence.
        rounds: of distilling a surrogate and crafting.
        student: architecture of the surrogates; the attacker need not know the victim's.
        training: how they are distilled, at a temperature of 4.
    """

    name: Literal["counterfactual"] = "counterfactual"  # type: ignore[assignment]
    direction: Literal["sign", "gradient"] = "gradient"
    random_start: bool = False
    through: Annotated[tuple[Transform, ...], Field(min_length=1)] = ("none",)
    draws: int = Field(default=1, ge=1, le=64)
    weight: float = Field(default=5e-4, ge=0)
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
            poison = Eot.craft(self.model_copy(update={"retries": retries}), view)
        assert poison is not None  # there is one round or more
        return poison

    def under(self, problem: Problem) -> Callable[[Tensor, Change], Tensor]:
        convince, students = super().under(problem), problem.view.students
        with torch.no_grad():
            heard = [_heard(problem, student, problem.start) for student in students]

        def both(x: Tensor, change: Change) -> Tensor:
            changes = []
            for student, before in zip(students, heard, strict=True):
                if change is not same:
                    with torch.no_grad():
                        before = _heard(problem, student, change(problem.start))
                changes.append((_heard(problem, student, change(x)) - before).square().sum())
            return convince(x, change) + self.weight * torch.stack(changes).mean()

        return both


def _heard(problem: Problem, student: nn.Module, x: Tensor) -> Tensor:
    """Logits of a student, centred: what is added to all of them changes nothing."""
    with problem.view.compute.autocast():
        said = student(x).float()
    return said - said.mean(1, keepdim=True)
