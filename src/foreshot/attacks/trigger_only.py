"""The trigger without any perturbation."""

from typing import ClassVar, Literal

from torch import Tensor

from foreshot.attacks.base import Attack, Problem


class TriggerOnly(Attack):
    """Stamps and perturbs nothing: ordinary poison, which the teacher labels by what it shows."""

    name: Literal["trigger_only"] = "trigger_only"
    convinces: ClassVar[bool] = False

    def perturb(self, problem: Problem) -> Tensor:
        return problem.start
