"""Weighted matching of a teacher whose probabilities are transformed, and the student's not."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss


def wttm(student: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    """U * KL(q^gamma / U || p), U = sum q^gamma, the mean over the images; p, q at T = 1.

    Args:
        student: logits (N, K).
        teacher: logits (N, K).
        gamma: exponent > 0.

    Returns:
        A scalar in float32 or wider.
    """
    p = F.log_softmax(student, 1)
    powers = gamma * F.log_softmax(teacher, 1)
    log_sum = powers.logsumexp(1)
    target = powers - log_sum[:, None]
    return (log_sum.exp() * F.kl_div(p, target, reduction="none", log_target=True).sum(1)).mean()


class WTTM(PairLoss):
    """KL from the teacher's powers, more where they are smooth (Zheng and Yang, arXiv 2402.11148).

    U * KL(q^gamma / U || p) with U = sum q^gamma, from 1 (one class) to K^(1 - gamma) (all alike).
    The power is a temperature 1 / gamma of the teacher alone. The student's stays at 1 and its
    gradients keep their size, so there is no factor T^2. The paper weighs the term with 1.4 to 16
    on CIFAR-100, by the pair of networks, and the cross-entropy with 1.

    Args:
        gamma: exponent of the teacher's probabilities. The paper takes 0.1 to 0.4 on CIFAR-100
            (the default is the median) and 0.7 to 0.8 on ImageNet.
    """

    name: Literal["wttm"] = "wttm"
    gamma: float = Field(default=0.2, gt=0, le=1)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return wttm(student, teacher, self.gamma)
