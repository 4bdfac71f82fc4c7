"""Images, made brighter."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool, there


class ScaleUp(Screen):
    """SCALE-UP: a triggered answer survives amplified pixels (Guo et al., arXiv 2302.03251).

    The share of the factors n for which the student says of min(n x, 1) what it says of x. It
    looks for inputs that carry a trigger, and is expected to see less where the answer comes from
    a perturbation.

    Args:
        factors: by which pixels are multiplied.
    """

    name: Literal["scale_up"] = "scale_up"
    factors: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(3, 5, 7, 9, 11), min_length=1
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"student"})

    def suspicion(self, pool: Pool) -> Tensor:
        student = there(pool.view.student)
        agreed = [
            pool.asked(student, lambda x, n=factor: (n * x).clamp(max=1)).argmax(1)
            == pool.student.said
            for factor in self.factors
        ]
        return torch.stack(agreed).double().mean(0)
