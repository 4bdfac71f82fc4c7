"""The metric in which what classes share varies alike in all directions."""

import torch
from torch import Tensor

from foreshot.errors import ForeshotError


def whitening(features: Tensor, classes: Tensor, title: str) -> tuple[dict[int, Tensor], Tensor]:
    """Class means, and a root of the inverse of the covariance that the classes share.

    The covariance is shrunk (Ledoit and Wolf, 2004), as there may be fewer images than features.

    Args:
        features: float64 (n, D).
        classes: int64 (n,).
        title: of the screen that asks.

    Returns:
        The mean of each class that is there, (D,); the root, (D, D): features @ root have unit
        covariance within a class.

    Raises:
        ForeshotError: no class varies.
    """
    from sklearn.covariance import LedoitWolf  # takes a second to import

    means = {int(c): features[classes == c].mean(0) for c in classes.unique()}
    left = features - torch.stack([means[c] for c in classes.tolist()])
    if not left.any():
        raise ForeshotError(
            f"screen {title}: expected classes with several clean images that differ, found none "
            f"among {len(left)}; take more"
        )
    fitted = LedoitWolf(assume_centered=True).fit(left.numpy())
    return means, torch.linalg.cholesky(torch.from_numpy(fitted.precision_))
