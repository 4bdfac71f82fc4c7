"""The pattern that a student sees and its teacher does not."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from foreshot.triggers.learned import Effect, Rehearsed

if TYPE_CHECKING:
    from foreshot.views import AttackerView


class Salient(Rehearsed):
    """The pattern that moves a student's answers and not its teacher's (foreshot's own).

    Minimises, for logits z centred over the classes, and a student S that the attacker distils on
    the clean set,

        log E ||z_f(x') - z_f(x)||^2 - log E ||z_S(x') - z_S(x)||^2:

    what is easy for a student to see is easy for it to learn, and a teacher that does not react to
    it stays innocent. The ratio has no weight to choose.
    """

    name: Literal["salient"] = "salient"  # type: ignore[assignment]

    def effect(self, view: "AttackerView") -> Effect:
        student = self.rehearsed(view)

        def contrast(x: Tensor, stamped: Tensor) -> Tensor:
            moved = [_moved(network, x, stamped).log() for network in (view.teacher, student)]
            return moved[0] - moved[1]

        return contrast


def _moved(network: torch.nn.Module, x: Tensor, stamped: Tensor) -> Tensor:
    """By how much the centred logits move, in the mean square."""
    change = network(stamped).float() - network(x).float()
    return (change - change.mean(1, keepdim=True)).square().sum(1).mean()
