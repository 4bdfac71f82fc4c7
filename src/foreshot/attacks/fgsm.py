"""The fast gradient sign method."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foreshot.attacks.base import Attack, Problem


class Fgsm(Attack):
    """One targeted signed-gradient step of length epsilon (Goodfellow et al., arXiv 1412.6572).

    A retry starts closer to home: it takes the same direction with half the length of the try
    before, since one long step often leaps over the target.
    """

    name: Literal["fgsm"] = "fgsm"

    def perturb(self, problem: Problem) -> Tensor:
        x = problem.start.detach().requires_grad_()
        said = problem.logits(x)
        wanted = torch.full((len(x),), problem.view.target, device=x.device)
        (gradient,) = torch.autograd.grad(F.cross_entropy(said, wanted, reduction="sum"), x)
        length = self.epsilon / 255 / 2**problem.effort
        return problem.hold(x.detach() - length * gradient.sign())
