"""Correlation congruence: the same correlations between the images of a batch."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.distillation.losses.base import Loss, Pair, Signals
from foreshot.distillation.losses.vectors import vectors

Kernel = Literal["gaussian", "bilinear"]


def correlations(x: Tensor, kernel: Kernel, gamma: float, order: int) -> Tensor:
    """Correlations (N, N) of the images of a batch, of their vectors at length one.

    Args:
        x: (N, C), a vector for each image.
        kernel: `bilinear`, x_i . x_j; or `gaussian`, exp(-gamma |x_i - x_j|^2), which for vectors
            of length one is exp(-2 gamma) sum_p (2 gamma)^p / p! (x_i . x_j)^p.
        gamma: width of the Gaussian kernel.
        order: the power p at which that series ends.
    """
    unit = F.normalize(x, dim=1)
    cosines = unit @ unit.T
    if kernel == "bilinear":
        return cosines
    weights = [(2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    terms = torch.stack([weight * cosines**p for p, weight in enumerate(weights)])
    return math.exp(-2 * gamma) * terms.sum(0)


class CC(Loss):
    """Congruent correlations of learned embeddings (Peng et al., arXiv 1904.01802).

    1/N^2 sum_ij (k(t_i, t_j) - k(s_i, s_j))^2, with linear embeddings s and t of the student's and
    the teacher's features, both learned, at length one, so that no embedding gains by shrinking.
    Alone the two embeddings can come to agree by telling no image from another: use it beside
    other terms. Maps and tokens are averaged first. Summed over the pairs of layers.

    Args:
        kernel: `gaussian`, by its Taylor series, or `bilinear`, the cosine itself.
        gamma: width of the Gaussian kernel.
        order: last power of the cosine in its Taylor series.
        dim: dimension of the embeddings.
    """

    name: Literal["cc"] = "cc"
    on_features: ClassVar[bool] = True
    kernel: Kernel = "gaussian"
    gamma: float = Field(default=0.4, gt=0)
    order: int = Field(default=2, ge=1)
    dim: int = Field(default=128, ge=1)

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.Module:  # noqa: ARG002
        return nn.ModuleList(
            nn.ModuleList(nn.Linear(vectors(feature).shape[1], self.dim) for feature in pair)
            for pair in pairs
        )

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        assert isinstance(learned, nn.ModuleList)
        values = []
        for pair, embeddings in zip(signals.pairs, learned, strict=True):
            assert isinstance(embeddings, nn.ModuleList)
            student, teacher = (
                correlations(embed(vectors(feature)), self.kernel, self.gamma, self.order)
                for embed, feature in zip(embeddings, pair, strict=True)
            )
            values.append(F.mse_loss(student, teacher))
        return torch.stack(values).sum()
