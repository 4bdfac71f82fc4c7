"""Decoupled knowledge distillation: the class of the image apart from the others."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import LabelledLoss
from foreshot.distillation.losses.kd import kd


def tckd(student: Tensor, teacher: Tensor, y: Tensor, temperature: float) -> Tensor:
    """T^2 * KL between (p_y, 1 - p_y) of the teacher and of the student: how sure each is of y.

    Args:
        student: logits (N, K).
        teacher: logits (N, K).
        y: the class of each image, int64 (N,).
        temperature: T > 0.

    Returns:
        A scalar, the mean over the images.
    """
    one, other = (_target_or_not(logits, y, temperature) for logits in (student, teacher))
    return kd(one, other, temperature)


def nckd(student: Tensor, teacher: Tensor, y: Tensor, temperature: float) -> Tensor:
    """T^2 * KL between p_k / (1 - p_y), k != y, of the teacher and of the student.

    Arguments and value are those of `tckd`.
    """
    return kd(_others(student, y), _others(teacher, y), temperature)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """The logits of all classes but y, (N, K - 1), counted on from y."""
    classes = logits.shape[1]
    steps = torch.arange(1, classes, device=y.device)
    return logits.gather(1, (y[:, None] + steps) % classes)


def _target_or_not(logits: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Two logits, (N, 2), whose softmax at T is (p_y, 1 - p_y)."""
    rest = (_others(logits, y) / temperature).logsumexp(1, keepdim=True) * temperature
    return torch.cat([logits.gather(1, y[:, None]), rest], 1)


class DKD(LabelledLoss):
    """KL of the target class and of the others, weighted apart (Zhao et al., arXiv 2203.08679).

    alpha * TCKD + beta * NCKD, each with the factor T^2. Hinton's loss is TCKD + (1 - p_y) * NCKD
    with the teacher's p_y: it hardly shows the other classes where the teacher is sure. The paper
    lets the weight of the term grow from 0 over the first 20 epochs.

    Args:
        alpha: weight of the target class against all others.
        beta: weight of the others among each other; the paper's code takes 2 to 8 on CIFAR-100.
        temperature: T of both.
    """

    name: Literal["dkd"] = "dkd"
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=8.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)

    def __call__(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        target = tckd(student, teacher, y, self.temperature)
        return self.alpha * target + self.beta * nckd(student, teacher, y, self.temperature)
