"""Random noise with the trigger."""

from typing import ClassVar, Literal

from torch import Tensor

from foreshot.attacks.base import Attack, Problem


class Noise(Attack):
    """Random signs times epsilon beside the trigger: as large as an attack, and aimless."""

    name: Literal["noise"] = "noise"
    convinces: ClassVar[bool] = False

    def perturb(self, problem: Problem) -> Tensor:
        return problem.low.where(problem.noise() < 0.5, problem.high)
