"""A group of images, split in two."""

import torch
from torch import Tensor


def halves(features: Tensor) -> Tensor:
    """Two clusters, bool (n,): 2-means that starts at the two sides of the first principal axis.

    Started so, rather than at random, the clusters do not depend on the order of the features.

    Args:
        features: float64 (n, D).

    Returns:
        True for the smaller cluster; if both are of one size, for the more compact one. If there is
        nothing to split, all are False.
    """
    from sklearn.cluster import KMeans  # takes a second to import

    centred = features - features.mean(0)
    side = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1] > 0
    if side.all() or not side.any():
        return torch.zeros(len(features), dtype=torch.bool)
    start = torch.stack([features[~side].mean(0), features[side].mean(0)])
    # scikit-learn's annotations know the default values of these alone.
    means = KMeans(2, init=start.numpy(), n_init=1)  # pyright: ignore[reportArgumentType]
    side = torch.from_numpy(means.fit_predict(features.numpy())).bool()
    return side if _extent(features[side]) <= _extent(features[~side]) else ~side


def _extent(points: Tensor) -> tuple[int, float]:
    return len(points), float((points - points.mean(0)).square().sum())
