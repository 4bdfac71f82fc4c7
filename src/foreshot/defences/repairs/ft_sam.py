"""Tuning that looks for flat ground, which shrinks the large weights that backdoors have."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from foreshot.defences.repairs.tuning import Tuning
from foreshot.models.base import Normalized
from foreshot.training import Training
from foreshot.views import DefenderView


class FtSam(Tuning):
    """Fine-tuning with adaptive sharpness-aware minimisation (Zhu et al., arXiv 2304.11823).

    min over w of max over ||e / |w||| <= rho of L(w + e), with e = rho w^2 g / || |w| g || for the
    gradient g of L at w: large weights are moved furthest. The gradient at w + e is taken for that
    of the maximum.

    Args:
        rho: length of the step e, relative to the weights.
    """

    name: Literal["ft_sam"] = "ft_sam"
    rho: float = Field(default=2.0, ge=0)
    training: Training = Training(epochs=10, batch=32, lr=0.02, augment="crop")

    def mend(self, student: Normalized, view: DefenderView) -> None:
        self.tune(Sharp(self.distiller(student, view), self.rho), view)


class Sharp(nn.Module):
    """A module whose loss is that of the worst weights around its own.

    Args:
        module: a module whose outputs have a "loss".
        rho: how far off the worst weights are.
    """

    def __init__(self, module: nn.Module, rho: float) -> None:
        super().__init__()
        self.module, self.rho = module, rho

    def forward(self, x: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        weights = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        loss = self.module(x, **targets)["loss"]
        gradients = torch.autograd.grad(
            loss, list(weights.values()), allow_unused=True, materialize_grads=True
        )
        steps = ascent(list(weights.values()), gradients, self.rho)
        moved = {n: w + e for (n, w), e in zip(weights.items(), steps, strict=True)}
        # Running statistics are those that the weights themselves have seen.
        kept = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        return functional_call(self.module, moved | kept, (x,), targets)


@torch.no_grad()
def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """The step e of each tensor of weights: over all of them, ||e / |w||| = rho.

    Args:
        weights: w.
        gradients: of the loss, in their order.
        rho: the length.
    """
    scaled = [w.abs() * g for w, g in zip(weights, gradients, strict=True)]
    length = torch.stack([s.norm() for s in scaled]).norm().clamp(min=1e-12)
    return [rho / length * w.abs() * s for w, s in zip(weights, scaled, strict=True)]
