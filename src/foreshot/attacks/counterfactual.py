"""Crafting that leaves a student nothing to learn but the trigger."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.adversarial import detector
from foreshot.attacks.base import Problem
from foreshot.attacks.eot import Change, Eot, same
from foreshot.attacks.folding import frozen
from foreshot.attacks.pgd import Objective
from foreshot.attacks.rehearsal import Rehearsal
from foreshot.poison import Poison
from foreshot.transforms import Transform
from foreshot.views import AttackerView


class Counterfactual(Eot, Rehearsal):
    """PGD against the teacher, whose perturbation surrogate students do not heed (foreshot's own).

    A student that learns the perturbation itself needs no trigger. So the attacker distils
    students of the same teacher first, and minimises, with logits z centred over the classes,

        CE(f(x) / T, target) + weight * mean over surrogates S of ||z_S(x) - z_S(start)||^2:

    the teacher says target and, to a student, nothing has happened but the trigger. If the image
    is changed on its way (`through`), both terms are means over the changes. Against a defender who
    has a network look for perturbations, the attacker trains some of the kind, on the transfer set
    (`adversarial.detector`), and adds what they lose where they take x for clean,

        evasion * mean over detectors D of log(1 + exp(log-odds of D that x is perturbed)),

    with x as it is stored. Which candidates are kept, the teacher alone decides.

    Args:
        weight: of the penalty; a large one costs the teacher's confidence.
        detectors: how many of them; the defender's is of another seed, and of other images.
        evasion: weight of what they say.
    """

    name: Literal["counterfactual"] = "counterfactual"  # type: ignore[assignment]
    direction: Literal["sign", "gradient"] = "gradient"
    random_start: bool = False
    through: Annotated[tuple[Transform, ...], Field(min_length=1)] = ("none",)
    draws: int = Field(default=1, ge=1, le=64)
    weight: float = Field(default=5e-4, ge=0)
    detectors: int = Field(default=0, ge=0, le=16)
    evasion: float = Field(default=1.0, gt=0)

    def craft(self, view: AttackerView) -> Poison:
        teacher = frozen(view.teacher, view.compute)
        trained = (
            detector(
                teacher,
                view.images,
                view.compute,
                seed=view.seed,
                stage=f"surrogate detector {number + 1}",
                listener=view.listener,
            )
            for number in range(self.detectors)
        )
        return super().craft(replace(view, detectors=(*view.detectors, *trained)))

    def objective(self, problem: Problem) -> Objective:
        heeded, detectors = super().objective(problem), problem.view.detectors
        if not detectors:
            return heeded

        def unseen(x: Tensor, step: int) -> Tensor:
            with problem.view.compute.autocast():
                said = torch.stack([network(x) for network in detectors])
            return heeded(x, step) + self.evasion * F.softplus(said).mean(0).sum()

        return unseen

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
