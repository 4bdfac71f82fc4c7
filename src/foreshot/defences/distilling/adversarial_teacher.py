"""A teacher whose answers small perturbations do not move."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from foreshot.adversarial import perturbed
from foreshot.defences.distilling.base import OwnTeacher
from foreshot.training import Supervised


class AdversarialTeacher(OwnTeacher):
    """The student learns from an adversarially trained teacher (Madry et al., arXiv 1706.06083).

    The defender trains a teacher of its own, on the data and the schedule of the first, to
    min E max_{|d| <= epsilon} CE(f(x + d), y). The inner maximum is sought by steps of
    min(1.25, 2.5 / steps) epsilon along the sign of the gradient, from a uniformly random start in
    the box; one step is the fast variant (Wong et al., arXiv 2001.03994). Poison that was crafted
    on the first teacher then has to fool one that it was not crafted on, and that is hard to fool;
    what that costs is accuracy. On the paper's 8/255 a small teacher learns little in few epochs,
    so that less is the default here.

    Args:
        epsilon: L-inf radius in 1/255, within [0, 1].
        steps: gradient steps; each costs as much as a step of training.
    """

    name: Literal["adversarial_teacher"] = "adversarial_teacher"
    epsilon: float = Field(default=2, gt=0, le=255)
    steps: int = Field(default=1, ge=1, le=100)

    def supervised(self, network: nn.Module) -> nn.Module:
        return Adversarial(network, self.epsilon / 255, self.steps)


class Adversarial(Supervised):
    """Cross-entropy of a network with the labels of perturbed images.

    Args:
        network: float (n, C, H, W) in [0, 1] -> logits (n, K).
        epsilon: L-inf radius, in the pixel range [0, 1].
        steps: of the perturbation, from a start that `fit` seeds.
    """

    def __init__(self, network: nn.Module, epsilon: float, steps: int) -> None:
        super().__init__(network)
        self.epsilon, self.steps = epsilon, steps

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return super().forward(perturbed(self.network, x, y, self.epsilon, self.steps, None), y)
