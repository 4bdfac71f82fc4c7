"""Local intrinsic dimension in the teacher's features."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool
from foreshot.errors import ForeshotError


class LocalDimension(Screen):
    """Local intrinsic dimension of teacher features is larger (Ma et al., arXiv 1801.02613).

    The maximum likelihood estimate -1 / mean_{i <= k} log(r_i / r_k), with r_1 <= ... <= r_k the
    distances from the k nearest reference images. The paper takes neighbours from a random batch
    of 100, and feeds the estimates of all layers to a classifier that has seen the attack; here it
    is the last layer's estimate alone.

    Args:
        neighbours: k.
    """

    name: Literal["lid"] = "lid"
    neighbours: int = Field(default=20, ge=2)
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    def suspicion(self, pool: Pool) -> Tensor:
        reference = pool.teacher_on_reference.features.double()
        if len(reference) < self.neighbours:
            raise ForeshotError(
                f"screen lid: expected a clean set of {2 * self.neighbours} images or more for "
                f"{self.neighbours} neighbours in one half of it, found {len(reference)} in it"
            )
        parts = pool.teacher.features.double().split(4096)
        return torch.cat([dimension(part, reference, self.neighbours) for part in parts])


def dimension(points: Tensor, reference: Tensor, neighbours: int) -> Tensor:
    """The estimate at each of `points` (n, D) from its nearest in `reference` (m, D): (n,)."""
    nearest = torch.cdist(points, reference).topk(neighbours, largest=False).values
    ratios = nearest.clamp(min=1e-12) / nearest[:, -1:].clamp(min=1e-12)
    return -1 / ratios.log().mean(1).clamp(max=-1e-12)
