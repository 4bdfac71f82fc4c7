"""Crafting that leaves a student nothing to learn but the trigger."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.base import Problem
from foreshot.attacks.eot import Change, Eot, same
from foreshot.attacks.rehearsal import Rehearsal
from foreshot.transforms import Transform


class Counterfactual(Eot, Rehearsal):
    """PGD against the teacher, whose perturbation surrogate students do not heed (foreshot's own).

    A student that learns the perturbation itself needs no trigger. So the attacker distils
    students of the same teacher first, and minimises, with logits z centred over the classes,

        CE(f(x) / T, target) + weight * mean over surrogates S of ||z_S(x) - z_S(start)||^2:

    the teacher says target and, to a student, nothing has happened but the trigger. If the image
    is changed on its way (`through`), both terms are means over the changes.

    Args:
        weight: of the penalty; a large one costs the teacher's confidence.
    """

    name: Literal["counterfactual"] = "counterfactual"  # type: ignore[assignment]
    direction: Literal["sign", "gradient"] = "gradient"
    random_start: bool = False
    through: Annotated[tuple[Transform, ...], Field(min_length=1)] = ("none",)
    draws: int = Field(default=1, ge=1, le=64)
    weight: float = Field(default=5e-4, ge=0)

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
