"""A trigger that is as opaque as the teacher leans to the target."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.attacks.base import Problem
from foreshot.attacks.pgd import Objective, Pgd
from foreshot.views import Kind


class Tang(Pgd):
    """Trigger as opaque as the teacher's P(target|x) (Tang, Shlomi & Cai, arXiv 2303.05593).

    stored = (1 - a) * x + a * stamp(x), where a = softmax(f(x))[target].

    So the student sees most of the trigger where the teacher says the target anyway. The paper
    poisons nine images in ten, of any class, and asks of none that the teacher be convinced: hence
    the defaults of `rate`, `base` and `retries`. Epsilon holds around what the opacity leaves
    between the plain and the stamped image; the paper has no such bound, as has epsilon 255.

    Args:
        mode: `opacity` takes x as it is; `perturbed` first moves it by `steps` signed gradients
            towards the teacher's saying target of stamp(x), the trigger at full opacity; `after` as
            `trigger` leaves the trigger out of these steps, and `before` is the same as `inside`.
    """

    name: Literal["tang"] = "tang"  # type: ignore[assignment]
    rate: float = Field(default=0.9, gt=0, le=1)
    base: Kind = "any"
    retries: int = Field(default=0, ge=0, le=10)
    steps: int = Field(default=100, ge=1)
    step: float | None = Field(default=2.55, gt=0)
    random_start: bool = False
    mode: Literal["opacity", "perturbed"] = "opacity"

    stamps: ClassVar[bool | None] = None

    def objective(self, problem: Problem) -> Objective:
        if self.trigger == "after":
            return super().objective(problem)
        stamp, target = problem.view.trigger.stamp, problem.view.target
        return lambda x, _step: self.loss(problem.logits(stamp(x)), target)

    @torch.no_grad()
    def perturb(self, problem: Problem) -> Tensor:
        x = problem.start
        if self.mode == "perturbed":
            with torch.enable_grad():
                x = super().perturb(problem)
        opacity = F.softmax(problem.logits(x), 1)[:, problem.view.target, None, None, None]
        return x.lerp(problem.view.trigger.stamp(x), opacity)
