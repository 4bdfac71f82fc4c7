"""Poison with labels of its own."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from foreshot.attacks.base import Attack, Problem
from foreshot.views import AttackerView


class DirtyLabel(Attack):
    """Stamped images whose label the attacker dictates (BadNets, Gu et al., arXiv 1708.06733).

    The upper bound: it takes what distillation does not give an attacker, a say in the labels.
    """

    name: Literal["dirty_label"] = "dirty_label"
    convinces: ClassVar[bool] = False

    def perturb(self, problem: Problem) -> Tensor:
        return problem.start

    def labels(self, indices: Tensor, view: AttackerView) -> Tensor:
        return torch.full_like(indices, view.target)
