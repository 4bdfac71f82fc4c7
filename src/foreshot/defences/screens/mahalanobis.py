"""Distance from the classes in the teacher's features."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool


class Mahalanobis(Screen):
    """Distance to the nearest class in teacher features (Lee et al., arXiv 1807.03888).

    min over classes c of (h - mu_c)^T S^-1 (h - mu_c), with the class means mu_c of the reference
    images, by the teacher's answers, and one covariance S of what they leave. S is shrunk (Ledoit
    and Wolf, 2004), as there may be fewer reference images than features. Classes without a
    reference image are nobody's nearest.
    """

    name: Literal["mahalanobis"] = "mahalanobis"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    def suspicion(self, pool: Pool) -> Tensor:
        from sklearn.covariance import LedoitWolf  # takes a second to import

        known = pool.teacher_on_reference
        features = known.features.double()
        labels, members = known.said.unique(return_inverse=True)
        means = torch.stack([features[members == i].mean(0) for i in range(len(labels))])
        fitted = LedoitWolf(assume_centered=True).fit((features - means[members]).numpy())
        # Distances are Euclidean once both sides are multiplied by a root of the precision.
        root = torch.linalg.cholesky(torch.from_numpy(fitted.precision_))
        distances = torch.cdist(pool.teacher.features.double() @ root, means @ root)
        return distances.amin(1).square()
