"""The Carlini-Wagner L2 attack."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.attacks.base import Attack, Problem
from foreshot.attacks.cw import margin


class CwL2(Attack):
    """The smallest perturbation in L2 that convinces (Carlini & Wagner, arXiv 1608.04644).

    Minimises ||x - x0||^2 + c * max(max_{i != target} z_i - z_target, -kappa) over w, where
    x = low + (high - low) * (tanh(w) + 1) / 2 keeps x in the box; c is searched by bisection for
    each image, and the successful x with the smallest L2 distance is kept.

    Args:
        steps: Adam steps for each c; a retry takes twice as many as the try before.
        searches: values of c that are tried.
        c: the first c.
        lr: Adam's learning rate on w.
        kappa: the margin of the logits that counts as success.
    """

    name: Literal["cw_l2"] = "cw_l2"
    steps: int = Field(default=50, ge=1)
    searches: int = Field(default=4, ge=1)
    c: float = Field(default=1.0, gt=0)
    lr: float = Field(default=0.1, gt=0)
    kappa: float = Field(default=3.0, ge=0)

    def perturb(self, problem: Problem) -> Tensor:
        low, high, start = problem.low, problem.high, problem.start
        width = (high - low).clamp(min=1e-12)
        origin = torch.atanh(((start - low) / width * 2 - 1).clamp(-0.999, 0.999))
        n = len(start)
        c = start.new_full((n,), self.c)
        floor, ceiling = torch.zeros_like(c), torch.full_like(c, float("inf"))
        best, shortest = start.clone(), torch.full_like(c, float("inf"))
        closest = torch.full_like(c, float("inf"))
        for _ in range(self.searches):
            w = origin.clone().requires_grad_()
            adam = torch.optim.Adam([w], lr=self.lr)
            reached = torch.zeros(n, dtype=torch.bool, device=start.device)
            for _ in range(self.steps * 2**problem.effort):
                x = low + (high - low) * (torch.tanh(w) + 1) / 2
                length = (x - start).square().sum((1, 2, 3))
                gap = margin(problem.logits(x), problem.view.target, self.kappa)
                (w.grad,) = torch.autograd.grad((length + c * gap).sum(), w)
                adam.step()
                success = gap <= -self.kappa + 1e-4
                # Until an image succeeds, the x with the smallest margin is the best there is.
                better = torch.where(
                    success, length < shortest, torch.isinf(shortest) & (gap < closest)
                )
                best = torch.where(better[:, None, None, None], x.detach(), best)
                shortest = torch.where(success & better, length.detach(), shortest)
                closest = torch.minimum(closest, gap.detach())
                reached |= success
            ceiling = torch.where(reached, torch.minimum(ceiling, c), ceiling)
            floor = torch.where(reached, floor, torch.maximum(floor, c))
            c = torch.where(torch.isinf(ceiling), c * 10, (floor + ceiling) / 2)
        return best
