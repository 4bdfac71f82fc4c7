"""Multi-level logit distillation: images, batches and classes."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.distillation.losses.base import PairLoss
from foreshot.distillation.losses.kd import kd


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """||B B' - A A'||^2 / R, of the products of the rows of two matrices A, B (R, C).

    Rows of probabilities relate the images of a batch; transposed, the classes.
    """
    return (teacher @ teacher.T - student @ student.T).square().sum() / len(student)


def mlkd(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Instance-, batch- and class-level alignment, summed over the temperatures.

    Args:
        student: logits (N, K).
        teacher: logits (N, K).
        temperatures: T > 0, one or more.

    Returns:
        A scalar in float32 or wider.
    """
    levels: list[Tensor] = []
    for temperature in temperatures:
        p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
        levels += kd(student, teacher, temperature), gram_distance(p, q), gram_distance(p.T, q.T)
    return torch.stack(levels).sum()


class MLKD(PairLoss):
    """Images, batches and classes aligned at several temperatures (Jin et al., CVPR 2023).

    The sum over T of T^2 * KL(q || p) + ||q q' - p p'||^2 / N + ||q' q - p' p||^2 / K, where p and
    q (N, K) are the probabilities of student and teacher at T. As in the paper's code the factor
    T^2 belongs to the divergence, where the others compare probabilities as they are. The last
    part sums over the images before it squares: it grows with the batch (the paper's has 64).

    This is the loss of one view. The weak and the strong view that the paper shows of each image
    are for the data pipeline to make, and so is its mask, which picks half of the images and of
    the classes of the weak view by the teacher's confidence. (In the paper's code the mask meets
    values that are summed up already, and comes to a factor of about a half.)

    Args:
        temperatures: T, each with a weight of one.
    """

    name: Literal["mlkd"] = "mlkd"
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(2.0, 3.0, 4.0, 5.0, 6.0), min_length=1
    )

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return mlkd(student, teacher, self.temperatures)
