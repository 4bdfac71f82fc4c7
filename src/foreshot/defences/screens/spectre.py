"""Robust whitening, and the directions in which variance is left."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import GroupScreen


class Spectre(GroupScreen):
    """SPECTRE: robust whitening shows the poison (Hayase et al., arXiv 2104.11315).

    The student's features of all images with the same answer of the teacher, on their first
    principal components, are whitened by a mean and covariance that outliers do not move. With C
    the covariance of the whitened z, the score is the quantum entropy score z^T Q z / tr Q with
    Q = exp(alpha (C - I) / (|C| - 1)). The paper estimates mean and covariance by robust filtering
    and searches the number of components; here the farthest images are left out, again and again
    (first by median and median absolute deviation along each component), and the number is set.

    Args:
        components: number of principal components.
        trimmed: share of a group that is left out of mean and covariance.
        alpha: 0 weighs all directions alike, infinity the one of largest variance alone.
    """

    name: Literal["spectre"] = "spectre"
    components: int = Field(default=10, ge=1)
    trimmed: float = Field(default=0.15, ge=0, lt=0.5)
    alpha: float = Field(default=4, ge=0)

    def within(self, features: Tensor) -> Tensor:
        centred = features - features.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -self.components :]
        points = centred @ axes
        if len(points) <= 2 * points.shape[1]:  # too few to whiten
            return torch.zeros(len(points), dtype=torch.float64)
        white = whitened(points, round((1 - self.trimmed) * len(points)))
        covariance = white.T.cov(correction=0).reshape(2 * (points.shape[1],))
        identity = torch.eye(len(covariance), dtype=torch.float64)
        largest = torch.linalg.matrix_norm(covariance, 2)
        excess = (largest - 1).clamp(min=1e-6)
        # The largest eigenvalue is taken off, which cancels: with little variance all of the
        # exponential would be zero.
        weights = torch.linalg.matrix_exp(self.alpha * (covariance - largest * identity) / excess)
        return ((white @ weights) * white).sum(1) / weights.trace()


def whitened(points: Tensor, kept: int, rounds: int = 10) -> Tensor:
    """Points (n, D) by the mean and covariance of the `kept` that lie nearest, found in rounds."""
    median = points.median(0).values
    spread = (points - median).abs().median(0).values.clamp(min=1e-12)
    white = (points - median) / spread
    for _ in range(rounds):
        near = white.square().sum(1).argsort(stable=True)[:kept]
        mean, covariance = points[near].mean(0), points[near].T.cov().reshape(2 * points.shape[1:])
        # A direction without variance is not to blow up.
        ridge = 1e-9 * covariance.trace().clamp(min=1e-12) * torch.eye(len(covariance))
        root = torch.linalg.cholesky(covariance + ridge)
        white = torch.linalg.solve_triangular(root, (points - mean).T, upper=False).T
    return white
