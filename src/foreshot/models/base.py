"""The family of architectures, and the wrapper by which every model takes pixels in [0, 1]."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from foreshot.errors import ForeshotError
from foreshot.family import Member


class Architecture(Member):
    """An architecture by name, for any number of channels and classes.

    The stages of every network are modules named ``layer1``, ``layer2``, ``layer3`` and so on, in
    the order in which they run, so that feature distillation can name them.
    """

    @abstractmethod
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A freshly initialised network: float (N, C, H, W), normalised -> logits (N, classes).

        Initialisation draws from torch's current RNG; `models.build` seeds it in a fork.

        Args:
            shape: (C, H, W) of one image.
            classes: number of logits.

        Raises:
            ForeshotError: images of this size do not fit the architecture.
        """

    def parts(self, model: "Normalized") -> list["Normalized"]:
        """What of a network is trained on labels apart from the rest; mostly all of it as one."""
        return [model]

    def adopt(self, student: "Normalized", teacher: nn.Module) -> None:
        """Takes over, before it is distilled, what a student keeps of its teacher; mostly nothing.

        Args:
            student: a network of this architecture, changed in place.
            teacher: its teacher.
        """

    @property
    def packages(self) -> frozenset[str]:
        """Packages beside torch that build it, and the networks that it is made of."""
        own = [getattr(self, field) for field in type(self).model_fields]
        inner = (part.packages for part in own if isinstance(part, Architecture))
        return frozenset[str]().union(*inner)

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"model {type(self).model_fields['name'].default}"

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each channel that its weights expect, in units of [0, 1].

        None stands for those of the training images.
        """
        return None

    def check_side(self, shape: tuple[int, int, int], smallest: int) -> None:
        """Refuses images with a side of fewer than `smallest` pixels."""
        _, height, width = shape
        if min(height, width) < smallest:
            wanted = f"images of at least {smallest} x {smallest} pixels"
            raise ForeshotError(f"{self.title}: expected {wanted}, found {height} x {width}")


class Normalized(nn.Module):
    """A network that takes pixels in [0, 1]; mean and standard deviation are part of its state.

    Attacks work on pixels, so the normalisation of each model has to be inside the model. The
    weights are laid out channels last, which convolutions on CPU and GPU are fastest with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.register_buffer("mean", mean.float().reshape(1, -1, 1, 1))
        self.register_buffer("std", std.float().reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each float32 (C,) in units of [0, 1], of uint8 (N, C, H, W)."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    # Counting the 256 levels is exact, and needs no copy of the set.
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for part in images.split(4096):
        for channel, count in zip(part.cpu().unbind(1), counts, strict=True):
            count += torch.bincount(channel.flatten(), minlength=256)
    number = counts.sum(1, keepdim=True)
    mean = (counts * levels).sum(1, keepdim=True) / number
    variance = (counts * (levels - mean) ** 2).sum(1, keepdim=True) / number
    return mean[:, 0].float(), variance[:, 0].sqrt().clamp(min=1e-3).float()


def kaiming(network: nn.Module) -> None:
    """Draws every convolution from the normal distribution of He et al. (2015), by fan-out.

    A network on the meta device has no values to draw; drawing none spares torch slow imports.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without a bias, padded so that only the stride changes the size."""
    return nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def active(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution, normalised and rectified."""
    conv = convolution(inputs, outputs, kernel, stride, groups)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
