"""Classes in place of probabilities."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from foreshot.distillation.losses.base import LabelledLoss


class HardLabels(LabelledLoss):
    """Cross-entropy with the class that the teacher names (Touvron et al., arXiv 2012.12877).

    -log softmax(z_s)_y with y = argmax z_t: of all that the teacher says the student is shown the
    answer alone, as behind an interface that gives no probabilities.

    Args:
        labels: what the `teacher` calls the image, or `given` with the set.
    """

    name: Literal["hard_labels"] = "hard_labels"
    labels: Literal["given", "teacher"] = "teacher"

    def __call__(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return F.cross_entropy(student, y)
