"""Two clusters in each group."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import GroupScreen
from foreshot.defences.screens.halves import halves


class ActivationClustering(GroupScreen):
    """Poison is the smaller of two clusters of its class (Chen et al., arXiv 1811.03728).

    The student's features of all images with the same answer of the teacher, on their first
    principal components, fall into two clusters (2-means). With a and b the distances from the
    centres of the larger and of the smaller cluster, s = (a - b) / max(a, b) says how surely an
    image is of the smaller one; the score is s times the group's mean |s| times the share of the
    group in the larger cluster: high for the members of a small cluster that lies apart.
    The paper has independent components, and judges clusters as a whole, by their sizes or
    silhouettes. Where most images of a group are poison, the clean ones are accused.

    Args:
        components: number of principal components.
    """

    name: Literal["activation_clustering"] = "activation_clustering"
    components: int = Field(default=10, ge=1)

    def within(self, features: Tensor) -> Tensor:
        centred = features - features.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -self.components :]
        points = centred @ axes
        second = halves(points)
        if not second.any():
            return torch.zeros(len(features), dtype=torch.float64)
        centres = torch.stack([points[~second].mean(0), points[second].mean(0)])
        larger, smaller = torch.cdist(points, centres).unbind(1)
        silhouette = (larger - smaller) / larger.maximum(smaller)
        return silhouette * silhouette.abs().mean() * (1 - second.double().mean())
