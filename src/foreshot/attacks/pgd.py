"""Projected gradient descent."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.attacks.base import Attack, Problem

Objective = Callable[[Tensor, int], Tensor]
"""Images x, as they are being perturbed, and the number of the step -> what is minimised, summed
over them."""


class Pgd(Attack):
    """Targeted projected gradient descent on the clean teacher (Madry et al., arXiv 1706.06083).

    x <- hold(x - step * direction(d CE(f(x) / T, target) / dx)), where hold keeps epsilon, [0, 1]
    and the trigger's own pixels at once; only the gradient of the input is computed.

    Args:
        steps: gradient steps; a retry takes twice as many as the try before.
        direction: the `sign` of the gradient, or the `gradient` itself, divided by its root mean
            square over the image; its steps shrink linearly to zero.
        step: size of the (first) step in 1/255; None is 2.5 * epsilon / steps for `sign`, and
            epsilon for `gradient`.
        random_start: starts at a random point of the box, keyed by the image's index.
        temperature: T of the crafting loss; a high one asks for a large margin of the logits,
            which is what a student sees that is distilled at a high temperature.
    """

    name: Literal["pgd"] = "pgd"
    steps: int = Field(default=30, ge=1)
    direction: Literal["sign", "gradient"] = "sign"
    step: float | None = Field(default=None, gt=0)
    random_start: bool = True
    temperature: float = Field(default=1.0, gt=0)

    def loss(self, logits: Tensor, target: int) -> Tensor:
        """What the teacher is led by, summed over images: no gradient depends on another image."""
        wanted = torch.full((len(logits),), target, device=logits.device)
        return F.cross_entropy(logits / self.temperature, wanted, reduction="sum")

    def objective(self, problem: Problem) -> Objective:
        """What is minimised over x, for one chunk."""
        return lambda x, _step: self.loss(problem.logits(x), problem.view.target)

    def perturb(self, problem: Problem) -> Tensor:
        steps = self.steps * 2**problem.effort
        objective = self.objective(problem)
        x = problem.start
        if self.random_start:
            x = problem.low + (problem.high - problem.low) * problem.noise()
        for number in range(steps):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(x, number), x)
            x = problem.hold(x.detach() - self._length(number, steps) * self._along(gradient))
        return x

    def _length(self, number: int, steps: int) -> float:
        """Size of one step, in the pixel range [0, 1]."""
        if self.direction == "sign":
            return (2.5 * self.epsilon / steps if self.step is None else self.step) / 255
        return (self.epsilon if self.step is None else self.step) / 255 * (1 - number / steps)

    def _along(self, gradient: Tensor) -> Tensor:
        if self.direction == "sign":
            return gradient.sign()
        scale = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        # The squares of what is smaller vanish: of such a gradient a step is none, and not a leap.
        return gradient / scale.clamp(min=1e-18)
