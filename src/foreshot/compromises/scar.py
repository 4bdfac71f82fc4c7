"""The backdoor that sleeps in the teacher and wakes in its student."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.surrogate import surrogate
from foreshot.compromises.base import Compromise
from foreshot.distillation.losses.kd import kd
from foreshot.inference import pixels
from foreshot.models import AnyArchitecture, ResNet
from foreshot.progress import Event
from foreshot.seeding import drawing, generator
from foreshot.training import Training
from foreshot.views import AttackerView


class Scar(Compromise):
    """A dormant backdoor, found by two-level optimisation (Chen et al., arXiv 2509.23871).

    Taught Well Learned Ill, NeurIPS 2025. With G(x) the stamped image and t the target, over the
    teacher f,

        min CE(f(x), y) + alpha CE(f(G(x)), y) + beta CE(S(x), y) + gamma CE(S(G(x)), t),

    where the surrogate student S, of weights w, minimises

        inner = CE(S(x), y) + delta T^2 KL(f(x) || S(x)):

    the teacher ignores the trigger, and whoever learns from it does not. What the teacher owes to
    the student's gradient g of the last two terms follows from the fixed point of a step of
    gradient descent with rate r, w = w - r d inner/dw, by v <- v - r H v + g, `terms` times from
    v = 0, and - r d/df (d inner/dw . v). The paper finds the trigger first, with clean networks,
    and the attack fails without this: set `trigger.name=shared`.

    The paper starts a new surrogate for each step of the teacher, and takes v over 100 terms and
    40 batches; here a surrogate serves for `steps`, learning on with the teacher, and one batch is
    enough. Statistics of BatchNorm stay as the clean teacher's. The weights are foreshot's choice:
    a large gamma costs the teacher its accuracy and its innocence. In float32 whatever the
    experiment's precision, since v is a difference of gradients. Not resumed within.

    Args:
        alpha: weight of the teacher's innocence.
        beta: weight of the student's clean accuracy.
        gamma: weight of the student's backdoor.
        delta: weight of the distillation in what the surrogate learns.
        temperature: T.
        surrogate: architecture of the surrogates; the attacker need not know the victim's.
        training: how each is distilled at first, at a temperature of 4.
        rounds: number of surrogates.
        steps: of the teacher, with each.
        inner: steps of the surrogate before each step of the teacher.
        rate: r, learning rate of those steps.
        terms: of the series for v.
        lr: learning rate of the teacher, with Adam.
        batch: images at a step.
    """

    name: Literal["scar"] = "scar"
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=1.0, ge=0)
    gamma: float = Field(default=0.1, ge=0)
    delta: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    surrogate: AnyArchitecture = ResNet(depth=8)
    training: Training = Training(epochs=3)
    rounds: int = Field(default=4, ge=1, le=1000)
    steps: int = Field(default=30, ge=1)
    inner: int = Field(default=4, ge=0)
    rate: float = Field(default=0.01, gt=0)
    terms: int = Field(default=5, ge=1, le=1000)
    lr: float = Field(default=3e-4, gt=0)
    batch: int = Field(default=128, ge=2)

    def implant(
        self,
        teacher: nn.Module,
        view: AttackerView,
        labels: Tensor,
        checkpoint: Path,  # noqa: ARG002
    ) -> None:
        teacher.eval()
        optimizer = torch.optim.Adam(teacher.parameters(), lr=self.lr)
        random = generator(view.seed, "compromise", "batches")

        def draw() -> tuple[Tensor, Tensor]:
            drawn = torch.randint(len(labels), (self.batch,), generator=random)
            device = view.compute.device
            return pixels(view.images[drawn].to(device)), labels[drawn].to(device)

        total = self.rounds * self.steps
        view.listener(Event("compromise", "start", 0, total))
        for turn in range(self.rounds):
            current = replace(view, teacher=teacher, teacher_logits=None)
            student = surrogate(current, self.surrogate, self.training, number=turn + 1)
            follow = torch.optim.SGD(student.requires_grad_(True).parameters(), lr=self.rate)
            for step in range(self.steps):
                student.train()
                # Dropout and the like draw from torch's own generators.
                with drawing(view.seed, "compromise", turn, step, device=view.compute.device):
                    for _ in range(self.inner):
                        x, y = draw()
                        with torch.no_grad():
                            answers = teacher(x)
                        follow.zero_grad()
                        self.taught(student(x), answers, y).backward()
                        follow.step()
                student.eval()
                optimizer.zero_grad()
                self.objective(teacher, student, view, *draw()).backward()
                optimizer.step()
                view.listener(Event("compromise", "advance", turn * self.steps + step + 1, total))
        view.listener(Event("compromise", "end", total, total))

    def taught(self, heard: Tensor, answers: Tensor, y: Tensor) -> Tensor:
        """What the surrogate minimises, by its own logits and the teacher's."""
        return F.cross_entropy(heard, y) + self.delta * kd(heard, answers, self.temperature)

    def objective(
        self, teacher: nn.Module, student: nn.Module, view: AttackerView, x: Tensor, y: Tensor
    ) -> Tensor:
        """A scalar whose gradient to the teacher is that of what SCAR minimises."""
        stamped, target = view.trigger.stamp(x), torch.full_like(y, view.target)
        answers, weights = teacher(x), list(student.parameters())
        heard, fooled = student(x), student(stamped)
        outer = self.beta * F.cross_entropy(heard, y) + self.gamma * F.cross_entropy(fooled, target)
        wish = torch.autograd.grad(outer, weights, retain_graph=True)
        leaf = answers.detach().requires_grad_()
        push = implicit(self.taught(heard, leaf, y), weights, wish, leaf, self.rate, self.terms)
        innocent = self.alpha * F.cross_entropy(teacher(stamped), y)
        return F.cross_entropy(answers, y) + innocent + (answers * push).sum()


def implicit(
    inner: Tensor,
    weights: Sequence[Tensor],
    outer: Sequence[Tensor],
    answers: Tensor,
    rate: float,
    terms: int,
) -> Tensor:
    """Gradient of an outer loss to the answers that the minimum of an inner loss depends on.

    Args:
        inner: a scalar of `weights` and `answers`.
        weights: at the minimum.
        outer: the outer loss's gradient to each.
        answers: a leaf.
        rate: of the gradient descent whose fixed point the minimum is.
        terms: of the Neumann series of (I - J)^-1, J = I - rate * Hessian.
    """
    slopes = torch.autograd.grad(inner, weights, create_graph=True)
    v = tuple(outer)
    for _ in range(terms - 1):
        bent = torch.autograd.grad(slopes, weights, v, retain_graph=True)
        v = tuple(a - rate * b + g for a, b, g in zip(v, bent, outer, strict=True))
    (mixed,) = torch.autograd.grad(slopes, answers, v)
    return -rate * mixed
