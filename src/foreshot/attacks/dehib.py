"""A perturbation that gives an image the features of the target class."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.attacks.base import Problem
from foreshot.attacks.pgd import Objective, Pgd
from foreshot.distillation.losses.vectors import vectors
from foreshot.inference import pixels
from foreshot.taps import Taps
from foreshot.views import AttackerView


class DeHiB(Pgd):
    """Trigger plus a perturbation that matches features of the target (Yan et al., AAAI 2021).

    CE(f(x) / T, target) + weight * min over anchors a of ||phi(x) - phi(a)||^2,

    with phi a layer of the teacher, averaged over its places: the paper's embedding. As there, the
    trigger is put on first and may be perturbed, and epsilon is 32. The paper's anchors have labels
    that the attacker here has not: they are images that the teacher calls the target. Its 1,000
    plain gradient steps, with the nearest anchor looked up anew at every thirtieth, are steps of
    `pgd` here, and the anchor is looked up at each.

    Args:
        weight: of the squared distance of the features.
        layer: of the teacher, whose output is matched.
        anchors: how many images of the target class are drawn to be matched.
    """

    name: Literal["dehib"] = "dehib"  # type: ignore[assignment]
    epsilon: int = Field(default=32, ge=0, le=255)
    trigger: Literal["before", "inside", "after"] = "before"
    random_start: bool = False
    weight: float = Field(default=1.0, ge=0)
    layer: str = "network.layer3"
    anchors: int = Field(default=100, ge=1)

    def beside(self, view: AttackerView) -> Tensor:
        return view.drawn("anchors", "target")[: self.anchors]

    def objective(self, problem: Problem) -> Objective:
        convince, device = super().objective(problem), problem.view.compute.device
        taps = Taps(problem.teacher, [self.layer], "teacher")

        def features() -> Tensor:
            return vectors(taps.collect()[self.layer]).float()

        with torch.no_grad():
            problem.logits(pixels(problem.beside.to(device)))
        anchors = features()

        def both(x: Tensor, step: int) -> Tensor:
            loss = convince(x, step)
            found = features()
            nearest = anchors[torch.cdist(found.detach(), anchors).argmin(1)]
            return loss + self.weight * (found - nearest).square().sum()

        return both
