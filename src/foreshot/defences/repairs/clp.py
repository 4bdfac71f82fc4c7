"""Channel Lipschitzness pruning: channels that could amplify a small change, without any data."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.defences.pool import Need
from foreshot.defences.repairs.base import Repair
from foreshot.defences.repairs.channels import normalised
from foreshot.models.base import Normalized
from foreshot.views import DefenderView


class Clp(Repair):
    """Prunes channels of a large Lipschitz constant, without data (Zheng et al., arXiv 2208.03111).

    Channel k of a convolution W with BatchNorm (gamma, sigma) has the constant |gamma_k / sigma_k|
    times the largest singular value of W_k as a matrix (inputs, kernel); pruned is what exceeds the
    mean of its layer by `u` standard deviations. No image is looked at, and no teacher.

    Args:
        u: standard deviations above the mean of the layer; lower prunes more.
    """

    name: Literal["clp"] = "clp"
    u: float = Field(default=3.0, ge=0)
    needs: ClassVar[frozenset[Need]] = frozenset()

    def mend(self, student: Normalized, view: DefenderView) -> None:
        for conv, bn in normalised(student, view.transfer.shape, self.title):
            constants = lipschitz(conv, bn)
            pruned = constants > constants.mean() + self.u * constants.std()
            with torch.no_grad():
                bn.weight[pruned] = 0
                bn.bias[pruned] = 0


@torch.no_grad()
def lipschitz(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """An upper bound of the Lipschitz constant of each channel, float (C,)."""
    assert bn.running_var is not None
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).abs()
    return scale * torch.linalg.matrix_norm(conv.weight.flatten(2), ord=2)
