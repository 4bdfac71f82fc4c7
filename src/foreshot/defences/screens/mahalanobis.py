"""Distance from the classes in the teacher's features."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool
from foreshot.defences.screens.whitening import whitening


class Mahalanobis(Screen):
    """Distance to the nearest class in teacher features (Lee et al., arXiv 1807.03888).

    min over classes c of (h - mu_c)^T S^-1 (h - mu_c), with the class means mu_c of the reference
    images, by the teacher's answers, and one covariance S of what they leave, shrunk. Classes
    without a reference image are nobody's nearest. The paper goes by true labels, perturbs inputs
    first, and adds up several layers, which takes poison to be learned from.
    """

    name: Literal["mahalanobis"] = "mahalanobis"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    def suspicion(self, pool: Pool) -> Tensor:
        known = pool.teacher_on_reference
        means, root = whitening(known.features.double(), known.said, self.title)
        # Distances are Euclidean once both sides are multiplied by the root.
        centres = torch.stack(list(means.values())) @ root
        distances = torch.cdist(pool.teacher.features.double() @ root, centres)
        return distances.amin(1).square()
