"""Knowledge distillation of standardised logits."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss
from foreshot.distillation.losses.kd import kd


def z_score(logits: Tensor) -> Tensor:
    """(z - mean) / sigma of each image's logits (N, K), with sigma^2 = sum (z - mean)^2 / K."""
    # Logits that are all the same have no sigma; a small one keeps their gradient finite.
    return F.layer_norm(logits, logits.shape[1:], eps=1e-12)


class LSKD(PairLoss):
    """KL of each image's standardised logits (Sun et al., arXiv 2403.01427).

    T^2 * KL(softmax(Z(z_t) / T) || softmax(Z(z_s) / T)), Z the z-score over the classes: the
    student need not match the range of the teacher's logits, only their relations. Sigma is the
    paper's, over K; its public code divides by K - 1, which is a temperature T * sqrt(K / (K - 1)).
    The paper weighs the term with 9 and the cross-entropy with 0.1 on CIFAR-100.

    Args:
        temperature: T, the base temperature; logits of standard deviation 1 / T remain.
    """

    name: Literal["lskd"] = "lskd"
    temperature: float = Field(default=2.0, gt=0)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd(z_score(student), z_score(teacher), self.temperature)
