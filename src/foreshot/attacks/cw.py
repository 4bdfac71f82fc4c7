"""The Carlini-Wagner margin in an L-inf ball."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from foreshot.attacks.pgd import Pgd


def margin(logits: Tensor, target: int, kappa: float) -> Tensor:
    """max(max of the other logits - target's logit, -kappa), (N,); -kappa is full success."""
    others = logits.clone()
    others[:, target] = -float("inf")
    return (others.amax(1) - logits[:, target]).clamp(min=-kappa)


class Cw(Pgd):
    """Projected gradient descent on the margin loss (Carlini & Wagner, arXiv 1608.04644).

    max(max_{i != target} z_i - z_target, -kappa), in the L-inf ball.

    Args:
        kappa: the margin of the logits at which an image is left alone.
    """

    name: Literal["cw"] = "cw"  # type: ignore[assignment]
    kappa: float = Field(default=20.0, ge=0)

    def loss(self, logits: Tensor, target: int) -> Tensor:
        return margin(logits, target, self.kappa).sum()
