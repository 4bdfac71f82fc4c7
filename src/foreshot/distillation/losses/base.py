"""The family of distillation losses."""

from abc import abstractmethod

from torch import Tensor

from foreshot.family import Member


class Loss(Member):
    """What a student is told to have in common with its teacher."""

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            student: what the student says, with gradient: logits (N, K), or the output of the
                layer that the term names; float32 or wider.
            teacher: the same of the teacher, without gradient.
        """
