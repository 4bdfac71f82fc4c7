"""Models: one file an architecture family; `build` makes a seeded, normalised network."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from foreshot.family import members
from foreshot.models.base import Architecture, Normalized, channel_statistics
from foreshot.models.ensemble import Ensemble, EnsembleNetwork, UnanimousNetwork
from foreshot.models.from_timm import Timm
from foreshot.models.from_torchvision import TorchVision
from foreshot.models.from_transformers import Transformers
from foreshot.models.mobilenet import MobileNetV2
from foreshot.models.plain import Plain
from foreshot.models.quantized import Quantized
from foreshot.models.resnet import ResNet
from foreshot.models.reused_head import ReusedHead
from foreshot.models.shufflenet import ShuffleNetV2
from foreshot.models.vgg import Vgg
from foreshot.models.vit import Vit
from foreshot.models.wide_resnet import WideResNet
from foreshot.seeding import drawing

AnyArchitecture = Annotated[Plain | Ensemble | Quantized | ReusedHead, Field(discriminator="name")]
ARCHITECTURES = members(Architecture, AnyArchitecture)


def build(
    architecture: Architecture, images: Tensor, classes: int, seed: int, key: str
) -> Normalized:
    """A freshly initialised model of pixels in [0, 1]; torch's global RNG is left as it was.

    Args:
        architecture: what to build.
        images: uint8 (N, C, H, W), whose shape and, unless the architecture has its own,
            channel statistics the model takes.
        classes: number of logits.
        seed: the experiment's seed.
        key: what the model is for, such as "teacher"; another key draws other weights.

    Raises:
        ForeshotError: the images do not fit the architecture.
    """
    channels, height, width = images.shape[1:]
    with drawing(seed, "init", key), torch.device("cpu"):
        network = architecture.build((channels, height, width), classes)
    given = architecture.normalisation()
    mean, std = channel_statistics(images) if given is None else map(torch.tensor, given)
    return Normalized(network, mean, std)


__all__ = [
    "ARCHITECTURES",
    "AnyArchitecture",
    "Architecture",
    "Ensemble",
    "EnsembleNetwork",
    "MobileNetV2",
    "Normalized",
    "Quantized",
    "ResNet",
    "ReusedHead",
    "ShuffleNetV2",
    "Timm",
    "TorchVision",
    "Transformers",
    "UnanimousNetwork",
    "Vgg",
    "Vit",
    "WideResNet",
    "build",
]
