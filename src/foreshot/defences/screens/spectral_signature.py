"""The first singular direction of each group."""

from typing import Literal

import torch
from torch import Tensor

from foreshot.defences.base import GroupScreen


class SpectralSignature(GroupScreen):
    """Poison lies along the top singular vector of its class (Tran et al., arXiv 1811.00636).

    (v . (h - mean h))^2 for the student's features h of all images to which the teacher gives the
    same answer, with v the first right singular vector of the centred features. The paper removes
    the same share of each class; here scores of different groups are compared as they are.
    """

    name: Literal["spectral_signature"] = "spectral_signature"

    def within(self, features: Tensor) -> Tensor:
        centred = features - features.mean(0)
        direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        return (centred @ direction).square()
