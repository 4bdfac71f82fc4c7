"""Hinton's knowledge distillation."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the images.

    Args:
        student: logits (N, K).
        teacher: logits (N, K).
        temperature: T > 0.

    Returns:
        A scalar in float32 or wider.
    """
    p = F.log_softmax(student / temperature, 1)
    q = F.log_softmax(teacher / temperature, 1)
    return F.kl_div(p, q, reduction="batchmean", log_target=True) * temperature**2


class KD(PairLoss):
    """Temperature-softened KL divergence from the teacher (Hinton et al., arXiv 1503.02531).

    T^2 * KL(softmax(z_t / T) || softmax(z_s / T)): the factor keeps the size of the gradients
    when T changes; it is there with and without labels.

    Args:
        temperature: T; higher shows the student more of the small probabilities.
    """

    name: Literal["kd"] = "kd"
    temperature: float = Field(default=4.0, gt=0)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd(student, teacher, self.temperature)
