"""Relative unlearning: what turns the student and not its teacher is taught to mean nothing."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.folding import frozen
from foreshot.audit.inversion import misled, size_of, sized
from foreshot.audit.student import CLEAN_MEAN, CLEAN_SPREAD, audit_student
from foreshot.defences.pool import there
from foreshot.defences.repairs.tuning import Tuning
from foreshot.distillation import KD, Distiller, Term
from foreshot.inference import evaluating
from foreshot.models.base import Normalized
from foreshot.seeding import generator
from foreshot.training import Training
from foreshot.views import DefenderView

PACE = 0.15
"""Length of a change's step, in units of the largest size that it may have."""
ENOUGH = 0.6
"""A change to a class is unlearned once its score, as an audit gives it, is as far below zero: then
the smallest one has to be 1.8 times what is usual for the student's classes. It is, too, once the
class is not among those that an audit looks at for longer."""
SUSPICIOUS = CLEAN_MEAN + CLEAN_SPREAD
"""Score from which on a further class is looked at: a standard deviation above clean students'."""
GROWTH = 3
"""How many times more each round unlearns than the one before it."""


class RelativeUnlearning(Tuning):
    """Unlearns the changes that turn the student and not its teacher (foreshot's own).

    The first round searches for the class with the most suspicious change d of all images, as
    `foreshot audit student` does; a later one adds what it finds if that is suspicious. Each tunes
    on what was found, with x cropped at random, M(x) these images mixed in pairs, S0 the student as
    it was, and s drawn from [0, 1]:

        (1 - share) KL(S0(M(x)) || S(M(x))) + share KL(teacher(x + s d) || S(x + s d)).

    Before it is shown, d itself takes a step towards what turns this student to its class, and not
    the teacher, and may grow to `reach`. A trigger is larger than the smallest change that works,
    and where one change is unlearned there are others to the same class: universal adversarial
    training (Shafahi et al., arXiv 1811.11304), for the classes that are suspicious.

    The first term holds the student where it was, so that a change which was no trigger's costs
    less; the teacher answers for the changed images themselves, so that what turns it as well is
    not unlearned. BatchNorm keeps its running statistics.

    A dot on `signs` is unlearned by little, a pattern over all of the image on `fashion-mnist-10k`
    is not, and much costs accuracy where it is not needed. So each round weighs the second term
    more than the one before, and the last is the one after which changes to the classes that were
    found have to be larger than is usual.

    Args:
        rounds: of searching and tuning, at most. A trigger may be hidden behind what a student is
            weak at by itself, which the first rounds take away.
        share: of the second term in the first round, 0 to 1; it grows to a half at most.
        reach: largest root mean square of d, in units of that of the smallest change that turns
            the teacher to the class.
    """

    name: Literal["relative_unlearning"] = "relative_unlearning"
    rounds: int = Field(default=3, ge=1)
    share: float = Field(default=0.03, gt=0, lt=1)
    reach: float = Field(default=2.5, gt=0)
    training: Training = Training(epochs=40, batch=32, lr=0.002, weight_decay=0.0, augment="crop")

    def mend(self, student: Normalized, view: DefenderView) -> None:
        before, teacher = deepcopy(student), frozen(view.teacher, view.compute)
        random = generator(view.seed, "repair", self.title)
        lesson = Unlearning(
            self.distiller(student, view), before.requires_grad_(False), self.share, random
        )
        for number in range(self.rounds):
            audited = audit_student(
                frozen(student, view.compute),
                teacher,
                there(view.clean),
                seed=view.seed + number,
                compute=view.compute,
                listener=view.listener,
            )
            known = [int(suspect.target) for suspect in lesson.suspects]
            another = not known or (audited.score > SUSPICIOUS and audited.target not in known)
            if not another and bool((audited.scores[known] <= -ENOUGH).all()):
                break
            if another:
                target = torch.tensor([audited.target])
                largest = self.reach * audited.usual[target]
                change = audited.changes.patterns[target]
                lesson.suspects.append(Suspect(target, change, largest).to(view.compute.device))
            if number:
                lesson.share = max(lesson.share, min(lesson.share * GROWTH, 0.5))
            # What the teacher says of the plain images is not what it says of the changed ones.
            self.tune(lesson, view, ask=False)


@dataclass(frozen=True, eq=False)
class Suspect:
    """A change of all images that turns a student alone.

    Args:
        target: the class that it turns the student to, int64 (1,).
        change: float (1, C, H, W), of pixels in [0, 1].
        largest: the root mean square that it may have, float (1,).
    """

    target: Tensor
    change: Tensor
    largest: Tensor

    def to(self, device: torch.device) -> "Suspect":
        """The same elsewhere."""
        return Suspect(*(part.to(device) for part in (self.target, self.change, self.largest)))


class Unlearning(nn.Module):
    """A lesson of changed images, for a student that is to stay what it is on all others.

    Args:
        lesson: the student's, with the student as its `student`.
        before: the student as it was.
        share: of the lesson in the loss.
        random: draws pairs, changes and how much of them.
    """

    def __init__(
        self, lesson: Distiller, before: nn.Module, share: float, random: torch.Generator
    ) -> None:
        super().__init__()
        self.lesson, self.share, self.random = lesson, share, random
        self.anchor = Distiller(lesson.student, before, [Term(loss=KD())])
        self.suspects: list[Suspect] = []

    def forward(self, x: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        with evaluating(self):
            kept = self.anchor(self.mixed(x))["loss"]
            unlearnt = self.lesson(self.changed(x), **targets)["loss"]
        return {"loss": (1 - self.share) * kept + self.share * unlearnt}

    def mixed(self, x: Tensor) -> Tensor:
        """Each image with another, in shares that are drawn for each pair."""
        share = self._drawn(len(x)).to(x)
        other = torch.randperm(len(x), generator=self.random).to(x.device)
        return share * x + (1 - share) * x[other]

    def changed(self, x: Tensor) -> Tensor:
        """Each image with as much as is drawn of one of the changes, which takes a step before."""
        which = int(torch.randint(len(self.suspects), (), generator=self.random))
        self.suspects[which] = suspect = self.stepped(x, self.suspects[which])
        return (x + self._drawn(len(x)).to(x) * suspect.change).clamp(0, 1)

    def stepped(self, x: Tensor, suspect: Suspect) -> Suspect:
        """A change, a step nearer to turning the student alone."""
        student, teacher, target = self.lesson.student, self.lesson.teacher, suspect.target
        with torch.no_grad():
            said = teacher(x).argmax(1)
        change = suspect.change.detach().requires_grad_()
        loss, _ = misled(student, teacher, x, said, target[:, None], change)
        (slope,) = torch.autograd.grad((loss * (said != target)).sum(), change)
        moved = change.detach() - PACE * sized(slope, suspect.largest)
        moved = sized(moved, size_of(moved).minimum(suspect.largest))
        return replace(suspect, change=moved)

    def _drawn(self, count: int) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=self.random)
