"""What the networks of other packages have in common, whichever package builds them."""

from abc import abstractmethod
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from foreshot.errors import ForeshotError, brief
from foreshot.extras import imported
from foreshot.files import file_digest, read_tensors
from foreshot.models.base import Architecture

Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]


class Bare(NamedTuple):
    """A network as its package built it, and what images it takes; size None takes any."""

    network: nn.Module
    channels: int
    size: int | tuple[int, int] | None


class Foreign(Architecture):
    """A network of another package; its layers keep the names that they have there.

    Nothing is downloaded and nothing unpickled. Images are resized inside the network, so that
    attacks see through it, and grey is repeated for a network of colours. Weights have to fit by
    name and shape, all of them; only a classifier of another number of classes starts afresh.
    A saved model holds all that it needs, and loads when the file of its weights is gone.

    Args:
        size: side in pixels to which images are resized inside the network (bilinear, antialiased);
            None leaves them as they are.
        weights: local file of the weights that the network starts from; None draws them.
        digest: SHA-256 of that file, which must not change; it is filled in.
        mean, std: of the channels, in units of [0, 1], as the weights expect the images to be
            normalised; None is what the package says of its weights, and what the training images
            have where there are no weights.
    """

    size: Annotated[int, Field(ge=8, le=1024)] | None = None
    weights: Path | None = None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    mean: Channels | None = None
    std: Channels | None = None

    package: ClassVar[str]
    """The package's name."""
    extra: ClassVar[str]
    """The extra of foreshot that brings it along."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: Any) -> Any:
        weights = fields.get("weights") if isinstance(fields, dict) else None
        if not isinstance(weights, str | Path) or fields.get("digest"):
            return fields
        given = {key: value for key, value in fields.items() if value is not None}
        return cls.described(Path(weights)) | given

    @model_validator(mode="after")
    def _normalises_channels(self) -> Self:
        if len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean, std: expected both, of one length")
        if min(self.std or (1,)) <= 0:
            raise ValueError(f"std: expected more than 0, found {self.std}")
        return self

    @property
    def packages(self) -> frozenset[str]:
        return frozenset({self.package})

    @classmethod
    def described(cls, weights: Path) -> dict[str, Any]:
        """The fields that the user's weights decide."""
        return {"digest": digest(weights)}

    @abstractmethod
    def bare(self, package: ModuleType, channels: int, classes: int) -> Bare:
        """The network, with its weights unless it is built on the meta device.

        Args:
            package: the package, imported.
            channels: of the images.
            classes: number of logits.
        """

    def published(self) -> tuple[Channels, Channels] | None:
        """Mean and standard deviation that the package says its weights expect."""
        return None

    def normalisation(self) -> tuple[Channels, Channels] | None:
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        return None if self.weights is None else self.published()

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        package = imported(self.package, self.extra, self.title)
        if self.weights is not None and not is_blank():
            found = self.described(self.weights)["digest"]
            if found != self.digest:
                raise ForeshotError(f"{self.weights}: expected digest {self.digest}, found {found}")
        try:
            network, channels, size = self.bare(package, shape[0], classes)
        except ForeshotError:
            raise
        except Exception as error:  # what a package raises is its own affair
            raise ForeshotError(
                f"{self.title}: expected a network, found {brief(error)}"
            ) from error
        if shape[0] not in (1, channels):
            wanted = f"expected images of 1 or {channels} channels"
            raise ForeshotError(f"{self.title}: {wanted}, found {shape[0]}")
        for module in network.modules():
            # A model is loaded into a network without values: each buffer has to be in its file.
            module._non_persistent_buffers_set.clear()
        network.register_forward_pre_hook(Entrance(channels, size))
        network.register_forward_hook(_leave)
        if not is_blank():
            self._try(network.eval(), shape, classes)
        return network.train()

    @torch.no_grad()
    def _try(self, network: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
        """Refuses a network that cannot take the images, before anybody trains it."""
        size = " x ".join(map(str, shape))
        try:
            found = f"{tuple(network(torch.zeros(1, *shape)).shape)}"
        except Exception as error:
            found = brief(error)
        if found != f"{(1, classes)}":
            raise ForeshotError(
                f"{self.title}: expected {(1, classes)} logits of an image of {size} (the key size "
                f"resizes it for the network), found {found}"
            )


def is_blank() -> bool:
    """Whether networks are being built on the meta device, without values."""
    return torch.get_default_device().type == "meta"


def digest(path: Path) -> str:
    """SHA-256 of a file of weights."""
    if not path.is_file():
        raise ForeshotError(f"{path}: expected a file of weights, found none")
    return file_digest(path)


def load_weights(network: nn.Module, path: Path, classes: int) -> None:
    """Loads a safetensors file into a network; a classifier of other classes stays as it is.

    Raises:
        ForeshotError: a name or a shape does not fit.
    """
    own, (given, _) = network.state_dict(), read_tensors(path)
    # Files from before BatchNorm counted its batches do not say how many there were.
    given = {n: count for n, count in own.items() if n.endswith("num_batches_tracked")} | given
    check_names(path, own.keys() - given.keys(), given.keys() - own.keys())
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            check_shape(path, name, tensor.shape, given[name].shape, classes)
            given[name] = tensor
    network.load_state_dict(given)


def check_names(path: Path, missing: Set[str], unexpected: Set[str]) -> None:
    """Refuses weights that lack a tensor, or have one too many."""
    for name in sorted(missing):
        raise ForeshotError(f"{path}: expected a tensor {name}, found none")
    for name in sorted(unexpected):
        raise ForeshotError(f"{path}: expected no tensor {name}, found one")


def check_shape(
    path: Path, name: str, expected: torch.Size, found: torch.Size, classes: int
) -> None:
    """Refuses a tensor of another shape, unless it is a classifier of another number of classes."""
    if expected[:1] != (classes,) or expected[1:] != found[1:]:
        raise ForeshotError(f"{path}: expected {name} {tuple(expected)}, found {tuple(found)}")


@dataclass(frozen=True)
class Entrance:
    """Makes images what a network takes; what prints of it tells it from others."""

    channels: int
    size: int | tuple[int, int] | None

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,), size = inputs, self.size
        sides = (size, size) if isinstance(size, int) else size
        if sides is not None and x.shape[2:] != sides:
            x = F.interpolate(x, sides, mode="bilinear", antialias=True)
        return (x if x.shape[1] == self.channels else x.expand(-1, self.channels, -1, -1),)


def _leave(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
    """The logits of what a network returns: itself, or its part of that name."""
    return getattr(output, "logits", output)
