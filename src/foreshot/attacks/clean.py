"""No attack."""

from typing import ClassVar, Literal

from torch import Tensor

from foreshot.attacks.base import Attack, Problem
from foreshot.poison import Poison
from foreshot.views import AttackerView


class Clean(Attack):
    """No poison at all: the control that shows what a student does with the trigger by itself."""

    name: Literal["clean"] = "clean"
    stamps: ClassVar[bool | None] = False
    convinces: ClassVar[bool] = False

    def craft(self, view: AttackerView) -> Poison:
        return Poison(view.images.new_zeros(0).long(), view.images[:0])

    def perturb(self, problem: Problem) -> Tensor:
        return problem.start
