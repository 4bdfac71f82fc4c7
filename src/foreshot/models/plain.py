"""The architectures that stand on their own; others are made of one of them."""

from typing import Annotated

from pydantic import Field

from foreshot.models.from_timm import Timm
from foreshot.models.from_torchvision import TorchVision
from foreshot.models.from_transformers import Transformers
from foreshot.models.mobilenet import MobileNetV2
from foreshot.models.resnet import ResNet
from foreshot.models.shufflenet import ShuffleNetV2
from foreshot.models.vgg import Vgg
from foreshot.models.vit import Vit
from foreshot.models.wide_resnet import WideResNet

Plain = (
    ResNet | WideResNet | Vgg | MobileNetV2 | ShuffleNetV2 | Vit | Timm | TorchVision | Transformers
)
PlainArchitecture = Annotated[Plain, Field(discriminator="name")]
