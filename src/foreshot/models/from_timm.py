"""Networks of timm (PyTorch Image Models)."""

from types import ModuleType
from typing import ClassVar, Literal

from foreshot.errors import ForeshotError, nearest
from foreshot.extras import imported
from foreshot.models.foreign import Bare, Channels, Foreign, is_blank, load_weights


class Timm(Foreign):
    """Image classifier of the package timm, by its name there (Wightman 2019), with local weights.

    Without weights, and without mean and std, it is built for the channels of the images; else for
    as many as mean has, and grey images are repeated. Weights are a safetensors file in timm's own
    names, as its repositories hold it (model.safetensors).

    Args:
        model: what `timm.list_models()` calls it, with a tag (``resnet18.a1_in1k``) if its weights'
            normalisation is the tag's.
    """

    name: Literal["timm"] = "timm"
    model: str = "resnet18"

    package: ClassVar[str] = "timm"
    extra: ClassVar[str] = "timm"

    def bare(self, package: ModuleType, channels: int, classes: int) -> Bare:
        # timm itself would look up other names, such as hf-hub:owner/name, on the net.
        if not package.is_model(self.model):
            hint = nearest(self.model, package.list_models())
            hint = hint if hint.startswith("did") else "expected one of timm.list_models()"
            raise ForeshotError(f"{self.title}: found {self.model!r}; {hint}")
        given = self.normalisation()
        channels = channels if given is None else len(given[0])
        network = package.create_model(self.model, num_classes=classes, in_chans=channels)
        if self.weights is not None and not is_blank():
            load_weights(network, self.weights, classes)
        return Bare(network, channels, self.size)

    def published(self) -> tuple[Channels, Channels] | None:
        timm = imported(self.package, self.extra, self.title)
        config = timm.get_pretrained_cfg(self.model)
        return None if config is None else (tuple(config.mean), tuple(config.std))
