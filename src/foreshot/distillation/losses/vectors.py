"""Features as one vector an image, which is what relations are measured between."""

from torch import Tensor

from foreshot.distillation.losses.base import maps


def vectors(feature: Tensor) -> Tensor:
    """A feature as vectors (N, C): maps are averaged over their places, tokens over the tokens.

    The average over the places is what a ResNet gives its classifier.

    Args:
        feature: (N, C), (N, T, C) or (N, C, H, W).

    Raises:
        ForeshotError: it has another number of dimensions.
    """
    return maps(feature).mean((2, 3))
