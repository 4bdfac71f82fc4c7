"""Adversarial neuron pruning: channels that a small change of weights turns against the answers."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from foreshot.defences.repairs.channels import normalisations
from foreshot.defences.repairs.tuning import Tuning
from foreshot.models.base import Normalized
from foreshot.seeding import generator
from foreshot.training import Training
from foreshot.views import DefenderView


class Anp(Tuning):
    """Prunes channels that are sensitive to changed weights (Wu and Wang, arXiv 2110.14430).

    min over masks m in [0, 1] of alpha L(m w, b) + (1 - alpha) max over |d|, |e| <= epsilon of
    L((m + d) w, (1 + e) b), with the weights w and biases b of every BatchNorm; channels whose mask
    ends below `threshold` lose their weight. The maximum is one signed step from a random start,
    and BatchNorm uses the statistics of the batch, as in the authors' code, which lets that step
    leave epsilon; this does not.

    Args:
        epsilon: largest relative change of weights and biases.
        alpha: share of the loss without a change, 0 to 1.
        threshold: masks below it are pruned, 0 to 1; the paper's 0.2 is for longer training.
    """

    name: Literal["anp"] = "anp"
    epsilon: float = Field(default=0.4, ge=0)
    alpha: float = Field(default=0.2, ge=0, le=1)
    threshold: float = Field(default=0.4, ge=0, le=1)
    training: Training = Training(epochs=100, batch=128, lr=0.2, warmup=0.0, weight_decay=0.0)

    def mend(self, student: Normalized, view: DefenderView) -> None:
        layers = normalisations(student, self.title)
        masks = self.masks(student, view, layers)
        with torch.no_grad():
            for layer, mask in zip(layers.values(), masks, strict=True):
                layer.weight[mask < self.threshold] = 0

    def masks(
        self, student: Normalized, view: DefenderView, layers: dict[str, nn.BatchNorm2d]
    ) -> list[Tensor]:
        """What the masks of the student's BatchNorm layers end as; the student stays as it is."""
        student.requires_grad_(False)
        random = generator(view.seed, "repair", self.title)
        masked = Masked(self, self.distiller(student, view), layers, random)
        self.tune(masked, view)
        student.requires_grad_(True)
        return [mask.detach().clamp(0, 1) for mask in masked.masks]


class Masked(nn.Module):
    """A student whose BatchNorm weights are masked; the masks are what is trained.

    Args:
        how: epsilon and alpha.
        module: the student's lesson, with the student as its `student`.
        layers: the student's BatchNorm layers by their names.
        random: draws where the changes start.
    """

    def __init__(
        self,
        how: Anp,
        module: nn.Module,
        layers: dict[str, nn.BatchNorm2d],
        random: torch.Generator,
    ) -> None:
        super().__init__()
        self.how, self.module, self.layers, self.random = how, module, layers, random
        self.masks = nn.ParameterList([torch.ones_like(bn.weight) for bn in layers.values()])

    def forward(self, x: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            for mask in self.masks:
                mask.clamp_(0, 1)
        plain = self._loss([torch.zeros_like(mask) for mask in self.masks] * 2, x, targets)
        worst = self._loss(self.worst(x, targets), x, targets)
        return {"loss": self.how.alpha * plain + (1 - self.how.alpha) * worst}

    def worst(self, x: Tensor, targets: dict[str, Tensor]) -> list[Tensor]:
        """The changes of the weights, then those of the biases, that do most harm."""
        epsilon = self.how.epsilon
        starts = [
            (epsilon * (2 * torch.rand(mask.shape, generator=self.random) - 1)).to(mask)
            for mask in [*self.masks, *self.masks]
        ]
        changes = [start.requires_grad_() for start in starts]
        loss = self._loss(changes, x, targets)
        gradients = torch.autograd.grad(loss, changes, allow_unused=True, materialize_grads=True)
        return [
            (change.detach() + epsilon * gradient.sign()).clamp(-epsilon, epsilon)
            for change, gradient in zip(changes, gradients, strict=True)
        ]

    def _loss(self, changes: list[Tensor], x: Tensor, targets: dict[str, Tensor]) -> Tensor:
        # The student's own running statistics stay what they are.
        state = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        half = len(self.masks)
        for (name, bn), mask, d, e in zip(
            self.layers.items(), self.masks, changes[:half], changes[half:], strict=True
        ):
            state[f"student.{name}.weight"] = (mask + d) * bn.weight
            state[f"student.{name}.bias"] = (1 + e) * bn.bias
        return functional_call(self.module, state, (x,), targets)["loss"]
