"""The channels of a network, as its BatchNorm layers have them."""

from typing import Any

import torch
from torch import Tensor, nn

from foreshot.errors import ForeshotError
from foreshot.inference import evaluating
from foreshot.models.base import Normalized


def normalisations(student: Normalized, who: str) -> dict[str, nn.BatchNorm2d]:
    """The BatchNorm layers that have weights, by their names.

    Args:
        student: any network.
        who: the defence that needs them.

    Raises:
        ForeshotError: there is none.
    """
    found = {
        name: layer
        for name, layer in student.named_modules()
        if isinstance(layer, nn.BatchNorm2d) and layer.affine
    }
    if not found:
        raise ForeshotError(
            f"defence {who}: expected a student with BatchNorm, "
            f"found {type(student.network).__name__} without"
        )
    return found


def normalised(
    student: Normalized, shape: tuple[int, int, int], who: str
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each BatchNorm that is fed by a convolution alone, and this convolution before it.

    Args:
        student: any network.
        shape: (C, H, W) of an image: what follows what is seen by running the network.
        who: the defence that needs them.

    Raises:
        ForeshotError: there is no BatchNorm.
    """
    maps: list[tuple[nn.Conv2d, Tensor]] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            maps.append((layer, output))
        elif isinstance(layer, nn.BatchNorm2d):
            pairs.extend((conv, layer) for conv, made in maps if made is inputs[0])

    convolutions = [layer for layer in student.modules() if isinstance(layer, nn.Conv2d)]
    layers = [*convolutions, *normalisations(student, who).values()]
    handles = [layer.register_forward_hook(note) for layer in layers]
    with evaluating(student), torch.no_grad():
        student(student.mean.new_zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return pairs
