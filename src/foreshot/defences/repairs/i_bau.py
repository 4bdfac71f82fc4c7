"""Adversarial unlearning: the change of all images that misleads most is taught to mean nothing."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.defences.repairs.tuning import Tuning
from foreshot.inference import evaluating
from foreshot.models.base import Normalized
from foreshot.training import Training
from foreshot.views import DefenderView


class IBau(Tuning):
    """Unlearns the perturbation that misleads on all images (Zeng et al., arXiv 2110.03735).

    min over w of (L(x; w) + L(x + d; w)) / 2 where d = argmax over ||d|| <= radius of L(x + d; w),
    one d for all images of a batch. This is the first-order variant: d is a constant in the
    gradient. The paper adds how d moves with w, the implicit hypergradient; where one loss is
    maximised and minimised, that part vanishes at the maximum (Danskin's theorem). The trusted
    teacher answers for the perturbed images themselves, so that what misleads it as well is not
    unlearned. BatchNorm keeps its running statistics.

    Args:
        radius: largest L2 norm of d over all pixels and channels of an image, in units of [0, 1].
        steps: steps of gradient ascent to d, from 0, each of length 2 radius / steps.
    """

    name: Literal["i_bau"] = "i_bau"
    radius: float = Field(default=3.0, gt=0)
    steps: int = Field(default=4, ge=1)
    training: Training = Training(epochs=10, batch=32, lr=0.002)

    def mend(self, student: Normalized, view: DefenderView) -> None:
        self.tune(Unlearning(self, self.distiller(student, view)), view)

    def worst(self, module: nn.Module, x: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The perturbation d, float (1, C, H, W)."""
        d, length = torch.zeros_like(x[:1]), 2 * self.radius / self.steps
        for _ in range(self.steps):
            loss = module(moved(x, d.requires_grad_()), **targets)["loss"]
            (slope,) = torch.autograd.grad(loss, d)
            d = d.detach() + length * slope / slope.norm().clamp(min=1e-12)
            d = d * (self.radius / d.norm().clamp(min=self.radius))
        return d


class Unlearning(nn.Module):
    """A student's lesson, on images as they are and with the worst perturbation.

    Args:
        how: the repair.
        module: the lesson.
    """

    def __init__(self, how: IBau, module: nn.Module) -> None:
        super().__init__()
        self.how, self.module = how, module

    def forward(self, x: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        # The teacher's answers to the plain images are not its answers to the perturbed ones.
        others = {name: target for name, target in targets.items() if name != "teacher_logits"}
        with evaluating(self.module):
            d = self.how.worst(self.module, x, others)
            perturbed = self.module(moved(x, d), **others)["loss"]
            plain = self.module(x, **targets)["loss"]
        return {"loss": (plain + perturbed) / 2}


def moved(x: Tensor, d: Tensor) -> Tensor:
    """Images that carry a perturbation, still in [0, 1]."""
    return (x + d).clamp(0, 1)
