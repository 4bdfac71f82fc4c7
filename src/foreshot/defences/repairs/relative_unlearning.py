"""Relative unlearning: what turns the student and not its teacher is taught to mean nothing."""

from copy import deepcopy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.folding import frozen
from foreshot.audit.student import audit_student
from foreshot.defences.pool import there
from foreshot.defences.repairs.tuning import Tuning
from foreshot.distillation import KD, Distiller, Term
from foreshot.inference import evaluating
from foreshot.models.base import Normalized
from foreshot.seeding import generator
from foreshot.training import Training
from foreshot.views import DefenderView

FAINT, STRONG = 0.5, 4.0
"""How much of a change is added: the smallest one that works is fainter than a trigger."""


class RelativeUnlearning(Tuning):
    """Unlearns the changes that turn the student and not its teacher (foreshot's own).

    Each round searches for the class with the most suspicious change d of all images, as `foreshot
    audit student` does, and tunes on what the rounds have found, with M(x) the images x mixed in
    pairs, S0 the student as it was, and s drawn from [0.5, 4]:

        (1 - share) KL(S0(M(x)) || S(M(x))) + share KL(teacher(x + s d) || S(x + s d)).

    The first term holds the student where it was, so that a change which was no trigger's costs
    next to nothing; the teacher answers for the changed images themselves, so that what turns it as
    well is not unlearned. BatchNorm keeps its running statistics.

    Args:
        rounds: of searching and tuning. The trigger of little poison may be hidden behind what a
            student is weak at by itself, which the first rounds take away.
        share: of the second term, 0 to 1.
    """

    name: Literal["relative_unlearning"] = "relative_unlearning"
    rounds: int = Field(default=4, ge=1)
    share: float = Field(default=0.05, gt=0, lt=1)
    training: Training = Training(epochs=100, batch=32, lr=0.003, weight_decay=0.0)

    def mend(self, student: Normalized, view: DefenderView) -> None:
        before, lesson = deepcopy(student).requires_grad_(False), self.distiller(student, view)
        random, found = generator(view.seed, "repair", self.title), []
        teacher = frozen(view.teacher, view.compute)
        for number in range(self.rounds):
            audited = audit_student(
                frozen(student, view.compute),
                teacher,
                there(view.clean),
                seed=view.seed + number,
                compute=view.compute,
                listener=view.listener,
            )
            found.append(audited.changes.patterns[audited.target].to(view.compute.device))
            self.tune(Unlearning(lesson, before, torch.stack(found), self.share, random), view)


class Unlearning(nn.Module):
    """A lesson of changed images, for a student that is to stay what it is on all others.

    Args:
        lesson: the student's, with the student as its `student`.
        before: the student as it was.
        changes: float (k, C, H, W), of pixels in [0, 1].
        share: of the lesson in the loss.
        random: draws pairs, changes and how much of them.
    """

    def __init__(
        self,
        lesson: Distiller,
        before: nn.Module,
        changes: Tensor,
        share: float,
        random: torch.Generator,
    ) -> None:
        super().__init__()
        self.lesson, self.share, self.random = lesson, share, random
        self.anchor = Distiller(lesson.student, before, [Term(loss=KD())])
        self.changes = changes

    def forward(self, x: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        # The teacher's answers to the plain images are not its answers to the changed ones.
        others = {name: target for name, target in targets.items() if name != "teacher_logits"}
        with evaluating(self):
            kept = self.anchor(self.mixed(x))["loss"]
            unlearnt = self.lesson(self.changed(x), **others)["loss"]
        return {"loss": (1 - self.share) * kept + self.share * unlearnt}

    def mixed(self, x: Tensor) -> Tensor:
        """Each image with another, in shares that are drawn for each pair."""
        share = self._drawn(len(x)).to(x)
        other = torch.randperm(len(x), generator=self.random).to(x.device)
        return share * x + (1 - share) * x[other]

    def changed(self, x: Tensor) -> Tensor:
        """Each image with one of the changes."""
        much = FAINT + (STRONG - FAINT) * self._drawn(len(x)).to(x)
        which = torch.randint(len(self.changes), (len(x),), generator=self.random)
        return (x + much * self.changes[which.to(x.device)]).clamp(0, 1)

    def _drawn(self, count: int) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=self.random)
