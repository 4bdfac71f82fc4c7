"""Images of the target, made hard to recognise, so that the trigger is easier to learn."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.attacks.base import Problem
from foreshot.attacks.pgd import Objective, Pgd
from foreshot.attacks.rehearsal import Rehearsal
from foreshot.views import Kind


class LabelConsistent(Pgd, Rehearsal):
    """Target images made hard, then stamped (Turner, Tsipras & Madry, arXiv 1912.02771).

    x = argmax over the epsilon ball of mean over surrogates S of CE(S(x) / T, target),

    on images that are the target already: a student that no longer recognises them has the trigger
    to learn from. The paper perturbs on a network of its own and dictates nothing, since the labels
    are right. Here the teacher labels, so the perturbation is made on a student of the attacker's,
    and only an image counts that the teacher still calls the target; a retry goes half as far from
    home as the try before.
    """

    name: Literal["label_consistent"] = "label_consistent"  # type: ignore[assignment]
    rate: float = Field(default=0.01, gt=0, le=1)
    base: Kind = "target"
    trigger: Literal["before", "inside", "after"] = "after"

    def objective(self, problem: Problem) -> Objective:
        view = problem.view

        def recognised(x: Tensor, _step: int) -> Tensor:
            with view.compute.autocast():
                said = [student(x).float() for student in view.students]
            return -torch.stack([self.loss(each, view.target) for each in said]).mean()

        return recognised

    def perturb(self, problem: Problem) -> Tensor:
        furthest = super().perturb(replace(problem, effort=0))
        return problem.start.lerp(furthest, 0.5**problem.effort)
