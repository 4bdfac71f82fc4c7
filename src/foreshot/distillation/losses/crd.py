"""Contrastive representation distillation: an image's features belong together, others' do not."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.distillation.losses.base import Loss, Pair, Signals
from foreshot.distillation.losses.vectors import vectors


def nce(positive: Tensor, negative: Tensor, total: int) -> Tensor:
    """Noise-contrastive estimation: tells the partner of an image from m images drawn at random.

    -log h(positive) - sum_k log(1 - h(negative_k)), the mean over the images, where
    h(u) = e^u / (e^u + m/M); for u = s / T - log Z that is (e^(s/T) / Z) / (e^(s/T) / Z + m/M).

    Args:
        positive: u of each image and its partner, (N,).
        negative: u of each image and m images drawn at random, (N, m).
        total: M, number of images that they are drawn from.

    Returns:
        A scalar.
    """
    # h is a logistic function; in logarithms no temperature overflows.
    noise = math.log(negative.shape[1] / total)
    found = F.logsigmoid(positive - noise)
    told_apart = F.logsigmoid(noise - negative).sum(1)
    return -(found + told_apart).mean()


def draw(step: Tensor, salt: Tensor, count: int, total: int) -> Tensor:
    """Integers in [0, total), (count,): the next `count` numbers of splitmix64 at each step.

    A hash of a counter needs no state but the step, and is computed where the step lives.

    Args:
        step: int64 scalar.
        salt: int64 scalar; another one draws others.
        count: how many to draw.
        total: number of integers to draw from.
    """

    def shifted(x: Tensor, bits: int) -> Tensor:  # with zeros, not the sign, from the left
        return (x >> bits) & ((1 << 64 - bits) - 1)

    # The generator's constants as they read in int64, whose arithmetic wraps around.
    counter = step * count + torch.arange(1, count + 1, device=step.device)
    x = salt + counter * -0x61C8864680B583EB
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return shifted(x ^ shifted(x, 31), 1) % total


class Memory(nn.Module):
    """Embeddings of a pair of layers, and what they were for each image when it was last seen.

    Args:
        widths: channels of the student's and the teacher's feature.
        dim: dimension of the embeddings.
        samples: number of images in the set.
    """

    rows: Tensor
    log_z: Tensor
    step: Tensor
    salt: Tensor

    def __init__(self, widths: Sequence[int], dim: int, samples: int) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.register_buffer("rows", F.normalize(torch.randn(len(widths), samples, dim), dim=2))
        self.register_buffer("log_z", torch.zeros(len(widths)))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("salt", torch.randint(1 << 62, ()))

    @torch.no_grad()
    def remember(self, embedded: Tensor, index: Tensor, momentum: float, log_z: Tensor) -> None:
        """Moves the rows of these images towards their embeddings, and counts the step."""
        moved = momentum * self.rows[:, index] + (1 - momentum) * embedded
        self.rows.index_copy_(1, index, F.normalize(moved, dim=2))
        self.log_z.copy_(log_z)
        self.step.add_(1)


class CRD(Loss):
    """Contrast of student and teacher over the whole set (Tian et al., arXiv 1910.10699).

    For each image, with the student as the anchor and then with the teacher:
    -log h(positive) - sum_k log(1 - h(negative_k)), h = (e^(s/T) / Z) / (e^(s/T) / Z + m/M), where
    s is the product of the anchor's embedding and a remembered embedding of the other network: of
    the same image, or of one of m drawn from the M images of the set. Embeddings are linear,
    learned for both networks, and of length one; what is remembered follows them with a momentum,
    in training mode only. Z is the mean of e^(s/T) over the first batch, times M.

    The negatives are drawn once a batch and shared by its images, as in MoCo, so that all scores
    are one matrix product; they are drawn with replacement, and an image may be its own negative,
    as in the authors' code. Maps and tokens are averaged first. Summed over the pairs of layers.

    Args:
        dim: dimension of the embeddings.
        negatives: m, how many images each is contrasted with.
        temperature: T, of the scores.
        momentum: share of what is remembered of an image when it is seen again.
    """

    name: Literal["crd"] = "crd"
    on_features: ClassVar[bool] = True
    needs_index: ClassVar[bool] = True
    dim: int = Field(default=128, ge=1)
    negatives: int = Field(default=16384, ge=1)
    temperature: float = Field(default=0.07, gt=0)
    momentum: float = Field(default=0.5, ge=0, lt=1)

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.Module:
        assert samples is not None  # the Distiller sees to it
        return nn.ModuleList(
            Memory([vectors(feature).shape[1] for feature in pair], self.dim, samples)
            for pair in pairs
        )

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        assert isinstance(learned, nn.ModuleList)
        assert signals.index is not None  # the Distiller sees to it
        values = []
        for pair, memory in zip(signals.pairs, learned, strict=True):
            assert isinstance(memory, Memory)
            values.append(self._contrast(pair, signals.index, memory))
        return torch.stack(values).sum()

    def _contrast(self, pair: Pair, index: Tensor, memory: Memory) -> Tensor:
        """The loss of one pair of layers; the first axis is student and teacher throughout."""
        embedded = torch.stack(
            [embed(vectors(x)) for embed, x in zip(memory.embed, pair, strict=True)]
        )
        anchors = F.normalize(embedded, dim=2)
        total = memory.rows.shape[1]
        drawn = draw(memory.step, memory.salt, self.negatives, total)
        # Each anchor meets the memory of the other network. Rows are copied as they are read, so
        # what autograd has saved is not changed when they are moved on.
        partners, others = (memory.rows[:, chosen].flip(0) for chosen in (index, drawn))
        scaled = anchors / self.temperature
        positive, negative = (scaled * partners).sum(2), scaled @ others.mT
        with torch.no_grad():
            log_sum = positive.logsumexp(1).logaddexp(negative.flatten(1).logsumexp(1))
            count = positive[0].numel() + negative[0].numel()
            estimate = log_sum + math.log(total / count)
            log_z = torch.where(memory.step > 0, memory.log_z, estimate)
        if memory.training:
            memory.remember(anchors, index, self.momentum, log_z)
        sides = zip(positive, negative, log_z, strict=True)
        return torch.stack([nce(p - z, n - z, total) for p, n, z in sides]).sum()
