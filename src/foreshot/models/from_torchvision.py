"""Networks of torchvision."""

from types import ModuleType
from typing import ClassVar, Literal

from foreshot.errors import ForeshotError, nearest
from foreshot.models.foreign import Bare, Channels, Foreign, is_blank, load_weights

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels, which all of torchvision's weights expect."""


class TorchVision(Foreign):
    """Image classifier of the package torchvision, by its name there, with local weights.

    It takes colours. Weights are a safetensors file in torchvision's own names; its published
    files are pickles, which foreshot does not open: load one with torch yourself, and write its
    state dict with `safetensors.torch.save_file`.

    Args:
        model: what `torchvision.models.list_models(torchvision.models)` calls it.
    """

    name: Literal["torchvision"] = "torchvision"
    model: str = "resnet18"

    package: ClassVar[str] = "torchvision"
    extra: ClassVar[str] = "torchvision"

    def bare(self, package: ModuleType, channels: int, classes: int) -> Bare:  # noqa: ARG002
        models = package.models
        names = models.list_models(models)
        if self.model not in names:
            raise ForeshotError(f"{self.title}: found {self.model!r}; {nearest(self.model, names)}")
        network = models.get_model(self.model, weights=None, num_classes=classes)
        if self.weights is not None and not is_blank():
            load_weights(network, self.weights, classes)
        return Bare(network, 3, self.size)

    def published(self) -> tuple[Channels, Channels] | None:
        return IMAGENET
