"""Crafting that leaves a student nothing to learn but the trigger."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.base import Problem, frozen
from foreshot.attacks.pgd import Objective, Pgd
from foreshot.distillation import KD, Distiller, Term
from foreshot.models import AnyArchitecture, ResNet, build
from foreshot.poison import Poison
from foreshot.training import Samples, Training, fit
from foreshot.views import AttackerView


class Counterfactual(Pgd):
    """PGD against the teacher, whose perturbation surrogate students do not heed (foreshot's own).

    A student that learns the perturbation itself needs no trigger. So the attacker distils
    students of the same teacher first, and minimises, with logits z centred over the classes,

        CE(f(x) / T, target) + weight * mean over surrogates S of ||z_S(x) - z_S(start)||^2:

    the teacher says target and, to a student, nothing has happened but the trigger. The first
    surrogate is distilled on the clean set, that of each further round on the poison of the
    round before; all of them are heeded.

    Args:
        weight: of the penalty; a large one costs the teacher's confidence.
        rounds: of distilling a surrogate and crafting.
        student: architecture of the surrogates; the attacker need not know the victim's.
        training: how they are distilled, at a temperature of 4.
    """

    name: Literal["counterfactual"] = "counterfactual"  # type: ignore[assignment]
    direction: Literal["sign", "gradient"] = "gradient"
    random_start: bool = False
    weight: float = Field(default=5e-4, ge=0)
    rounds: int = Field(default=1, ge=1, le=20)
    student: AnyArchitecture = ResNet(depth=8)
    training: Training = Training(epochs=4)

    def craft(self, view: AttackerView) -> Poison:
        view = replace(view, teacher_logits=view.answers())
        poison = None
        for number in range(self.rounds):
            surrogate = self._surrogate(view, poison, number + 1)
            view = replace(view, students=(*view.students, surrogate))
            # Only what is stored has to convince every time; the rest teaches a surrogate.
            retries = self.retries if number + 1 == self.rounds else 0
            poison = Pgd.craft(self.model_copy(update={"retries": retries}), view)
        assert poison is not None  # there is one round or more
        return poison

    def objective(self, problem: Problem) -> Objective:
        convince = super().objective(problem)
        students = problem.view.students
        with torch.no_grad():
            heard = [_heard(problem, student, problem.start) for student in students]

        def both(x: Tensor) -> Tensor:
            changes = [
                (_heard(problem, student, x) - before).square().sum()
                for student, before in zip(students, heard, strict=True)
            ]
            return convince(x) + self.weight * torch.stack(changes).mean()

        return both

    def _surrogate(self, view: AttackerView, poison: Poison | None, number: int) -> nn.Module:
        """A student that the attacker distils, frozen: of a seed that no victim has."""
        stage = f"surrogate student {number}"
        images, answers = view.images, view.answers()
        if poison is not None:
            images = images.index_copy(0, poison.indices, poison.images)
            answers = poison.answers(answers, view.teacher, view.compute)
        teacher = frozen(view.teacher, view.compute)
        # Of augmented views the teacher is asked anew.
        samples = Samples(images, {"teacher_logits": answers})
        if self.training.augment != "none":
            counted = self.training.augment != "strong"
            samples = Samples(images, teacher=teacher if counted else None)
        student = build(self.student, images, answers.shape[1], view.seed, stage)
        fit(
            Distiller(student, teacher, [Term(loss=KD(temperature=4))]),
            samples,
            self.training,
            view.compute,
            seed=view.seed,
            stage=stage,
            listener=view.listener,
        )
        return student.requires_grad_(False)


def _heard(problem: Problem, student: nn.Module, x: Tensor) -> Tensor:
    """Logits of a student, centred: what is added to all of them changes nothing."""
    with problem.view.compute.autocast():
        said = student(x).float()
    return said - said.mean(1, keepdim=True)
