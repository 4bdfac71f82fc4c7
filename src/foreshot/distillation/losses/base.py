"""The family of distillation losses, and what they may compare."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshot.errors import ForeshotError
from foreshot.family import Member

Pair = tuple[Tensor, Tensor]
"""What the student says, with gradient, and what the teacher says, without."""


@dataclass(frozen=True, eq=False)
class Signals:
    """What a loss may compare, for one batch of N images.

    Args:
        pairs: (student, teacher) outputs of the pairs of layers that the term names, in its order;
            of the logits (N, K) if it names none. float32 or wider.
        y: int64 (N,), labels; None unless the loss asks for them.
        index: int64 (N,), where in the set the images stand; None unless the loss asks for it.
    """

    pairs: Sequence[Pair]
    y: Tensor | None = None
    index: Tensor | None = None


class Loss(Member):
    """What a student is told to have in common with its teacher.

    The value is a mean over the images of the batch, in the precision of the signals.
    """

    on_features: ClassVar[bool] = False
    """Whether the term has to name layers; else it may, and takes the logits if it does not."""
    needs_index: ClassVar[bool] = False
    """Whether `Signals.index` has to be known, and with it the size of the set."""

    @abstractmethod
    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        """The loss of a batch, a scalar. It may not wait for the device.

        Args:
            signals: what to compare.
            learned: what `learn` made.
        """

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.Module | None:  # noqa: ARG002
        """What is trained beside the student, or remembered: regressors, memories; None for none.

        Initialisation draws from torch's current RNG; the `Distiller` seeds it in a fork.

        Args:
            pairs: as in `Signals`, of a few images: the shapes, and the teacher's statistics.
            samples: number of images in the set, if known.

        Raises:
            ForeshotError: signals of these shapes cannot be compared.
        """
        return None


class PairLoss(Loss):
    """A loss of one signal of the student and one of the teacher, summed over the pairs."""

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            student: logits (N, K), or the output of a layer; with gradient.
            teacher: the same of the teacher, without gradient.
        """

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:  # noqa: ARG002
        return torch.stack([self(*pair) for pair in signals.pairs]).sum()


class LabelledLoss(Loss):
    """A loss that tells the class of the image from the others.

    Args:
        labels: `given` with the set, or what the `teacher` calls the image.
    """

    labels: Literal["given", "teacher"] = "given"

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            student: logits (N, K), with gradient.
            teacher: logits (N, K).
            y: the class of each image, int64 (N,).
        """

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:  # noqa: ARG002
        assert signals.y is not None  # the Distiller sees to it
        y = signals.y
        return torch.stack([self(*pair, y) for pair in signals.pairs]).sum()


def maps(feature: Tensor) -> Tensor:
    """A feature as maps (N, C, H, W): a vector (N, C) is 1 x 1, tokens (N, T, C) are T x 1.

    Raises:
        ForeshotError: it has another number of dimensions.
    """
    if feature.dim() == 2:
        return feature[:, :, None, None]
    if feature.dim() == 3:
        return feature.transpose(1, 2)[:, :, :, None]
    if feature.dim() == 4:
        return feature
    raise ForeshotError(
        "distillation: expected features (N, C), (N, T, C) or (N, C, H, W), "
        f"found {tuple(feature.shape)}"
    )


def same_size(student: Tensor, teacher: Tensor) -> Pair:
    """Two features as maps of one size: the larger height and width are averaged down."""
    one, other = maps(student), maps(teacher)
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    one, other = (
        x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (one, other)
    )
    return one, other
