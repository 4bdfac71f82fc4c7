"""Several networks that answer as one."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.models.base import Architecture, Normalized
from foreshot.models.plain import PlainArchitecture
from foreshot.models.resnet import ResNet


class Ensemble(Architecture):
    """Networks that are trained apart and answer together (Lakshminarayanan, arXiv 1612.01474).

    The answer is log mean_m softmax(z_m), whose softmax is the mean of the members' probabilities.
    As a teacher it is You et al., Learning from Multiple Teacher Networks, KDD 2017.

    Args:
        of: the architecture of each.
        count: number of networks, each with weights and an order of images of its own.
    """

    name: Literal["ensemble"] = "ensemble"
    of: PlainArchitecture = ResNet(depth=8)
    count: int = Field(default=3, ge=2, le=100)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        return self.of.normalisation()

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return EnsembleNetwork([self.of.build(shape, classes) for _ in range(self.count)])

    def parts(self, model: Normalized) -> list[Normalized]:
        return [Normalized(member, model.mean, model.std) for member in model.network.children()]


class EnsembleNetwork(nn.Module):
    """Any networks with the same classes, as one: the log of the mean of their probabilities.

    Args:
        members: float (N, C, H, W) -> logits (N, K), each; they become ``member0`` and so on.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        for number, member in enumerate(members):
            self.add_module(f"member{number}", member)

    def forward(self, x: Tensor) -> Tensor:
        said = self.each(x)
        return said.logsumexp(0) - math.log(len(said))

    def each(self, x: Tensor) -> Tensor:
        """The logs of their probabilities, float32 (members, N, K)."""
        return torch.stack([member(x).float().log_softmax(1) for member in self.children()])


def members(network: nn.Module) -> list[nn.Module]:
    """The networks that a network is made of: those of an ensemble, or itself."""
    ensembles = [part for part in network.modules() if isinstance(part, EnsembleNetwork)]
    return list(ensembles[0].children()) if ensembles else [network]


class UnanimousNetwork(EnsembleNetwork):
    """As one that is sure of what all of them say: the mean of the logs of their probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x).mean(0)
