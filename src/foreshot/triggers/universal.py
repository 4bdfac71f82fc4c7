"""A universal adversarial perturbation."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foreshot.triggers.learned import Effect, Learned

if TYPE_CHECKING:
    from foreshot.views import AttackerView


class Universal(Learned):
    """The pattern that leads the clean teacher itself to the target on any image.

    Minimises the mean of CE(f(x'), target). With `attack.name=clean` it needs no poison at all, and
    bounds what poison adds: a student may well heed what leads its teacher astray. But the teacher
    is no longer innocent then, as its own ASR shows. The paper aims at no class, and adds up the
    smallest steps that turn one image after another; here signed gradients lead to the target, and
    the pattern is blended in.

    S.-M. Moosavi-Dezfooli, A. Fawzi, O. Fawzi, P. Frossard: Universal adversarial perturbations,
    CVPR 2017, arXiv 1610.08401.
    """

    name: Literal["universal"] = "universal"  # type: ignore[assignment]

    def effect(self, view: "AttackerView") -> Effect:
        def loss(x: Tensor, stamped: Tensor) -> Tensor:  # noqa: ARG001
            wanted = torch.full((len(stamped),), view.target, device=stamped.device)
            return F.cross_entropy(view.teacher(stamped).float(), wanted)

        return loss
