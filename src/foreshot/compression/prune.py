"""Pruning by magnitude."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils import prune

from foreshot.compression.base import Compression, trainable
from foreshot.models.base import Normalized
from foreshot.models.ensemble import members


class Prune(Compression):
    """The teacher without its smallest weights, or filters (Han et al., arXiv 1506.02626).

    What is pruned is zero, stays zero while the rest is distilled, and is zero in the saved model;
    its shape stays. The first convolution and the classifier are not pruned by filters.

    Args:
        amount: share that is pruned: of all weights of convolutions and linear layers together, or
            of the filters of each convolution.
        structure: `weights` of smallest magnitude, or `filters` of smallest L1 norm (Li et al.,
            arXiv 1608.08710).
    """

    name: Literal["prune"] = "prune"
    amount: float = Field(default=0.8, gt=0, lt=1)
    structure: Literal["weights", "filters"] = "weights"

    def start(self, teacher: Normalized) -> Normalized:
        student = trainable(teacher)
        # torch's pruning views weights as vectors, which it cannot of channels laid out last.
        student.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        if self.structure == "weights":
            pairs = [(layer, "weight") for layer in _layers(student)]
            prune.global_unstructured(pairs, prune.L1Unstructured, amount=self.amount)
        else:
            for network in members(student):
                for layer in list(_layers(network))[1:]:
                    if isinstance(layer, nn.Conv2d):
                        prune.ln_structured(layer, "weight", self.amount, n=1, dim=0)
        return student

    def finish(self, student: Normalized) -> None:
        for layer in _layers(student):
            if prune.is_pruned(layer):
                prune.remove(layer, "weight")


def _layers(network: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    return (layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
