"""One safetensors file holds a model: its weights, how to build it and what its classes are."""

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from foreshot.errors import ForeshotError
from foreshot.files import read_tensors, tensors_digest, write_tensors
from foreshot.models import AnyArchitecture
from foreshot.models.base import Architecture, Normalized
from foreshot.store import versions

FORMAT = "foreshot-model"
Side = Annotated[int, Field(ge=1, le=2**16)]


class Header(BaseModel):
    """What the file says about its weights; JSON under the key `foreshot-model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["foreshot-model"] = FORMAT
    version: Literal[1] = 1
    architecture: AnyArchitecture
    shape: tuple[Side, Side, Side]
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    digest: str


class LoadedModel(NamedTuple):
    """A model as it was saved, in eval mode."""

    model: Normalized
    architecture: AnyArchitecture
    shape: tuple[int, int, int]
    classes: tuple[str, ...]


def save_model(
    path: Path,
    model: Normalized,
    architecture: Architecture,
    shape: tuple[int, int, int],
    classes: tuple[str, ...],
) -> None:
    """Writes the model to `path`, whole or not at all.

    Args:
        path: file to write; its folder is made if need be.
        model: any mode, any device.
        architecture: what built the model's network.
        shape: (C, H, W) of the images that it takes.
        classes: class names, one a logit.

    Raises:
        ForeshotError: the model is not what the other arguments say.
    """
    fields = {"architecture": architecture.model_dump(), "shape": shape, "classes": classes}
    header = Header.model_validate({**fields, "digest": ""})
    header = header.model_copy(update={"digest": _digest(header, model)})
    _check_fit(path, _state(_blank(path, header)), _state(model))
    write_tensors(path, _state(model), {FORMAT: header.model_dump(mode="json")})


def load_model(path: Path, hint: str = "") -> LoadedModel:
    """Reads a model that `save_model` wrote; its weights are the same to the last bit.

    Args:
        path: the file.
        hint: what to add to the error of a file of other weights.

    Raises:
        ForeshotError: the file is missing, not such a file, damaged, or does not fit its header.
    """
    state, about = read_tensors(path)
    if FORMAT not in about:
        raise ForeshotError(f"{path}: expected metadata {FORMAT}, found none{hint}")
    try:
        header = Header.model_validate(about[FORMAT])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (FORMAT, *first["loc"])))
        raise ForeshotError(f"{path}: metadata {key}: {first['msg']}") from error
    model = _blank(path, header)
    _check_fit(path, _state(model), state)
    model.load_state_dict(state, assign=True)
    if (digest := _digest(header, model)) != header.digest:
        raise ForeshotError(f"{path}: expected digest {header.digest}, found {digest}")
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return LoadedModel(model.eval(), header.architecture, header.shape, header.classes)


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, by name."""
    return tensors_digest(_state(module))


def network_digest(network: nn.Module) -> str:
    """What tells a network from others: weights alone do not tell how it uses them."""
    # Networks of other packages resize what they are given in a hook, which does not print.
    found = [hook for module in network.modules() for hook in module._forward_pre_hooks.values()]
    hooks = [getattr(hook, "__qualname__", None) or repr(hook) for hook in found]
    packages = {type(module).__module__.partition(".")[0] for module in network.modules()}
    made = sorted(item for item in versions(*packages).items() if item[0] in packages)
    parts = network, hooks, made, state_digest(network)
    return sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def _digest(header: Header, model: Normalized) -> str:
    """SHA-256 over everything in the file but this digest."""
    text = header.model_dump_json(exclude={"digest"})
    return sha256(f"{text}\x1f{state_digest(model)}".encode()).hexdigest()


def _blank(path: Path, header: Header) -> Normalized:
    """The model without values: on the meta device nothing is allocated, and nothing drawn."""
    try:
        with torch.device("meta"):
            network = header.architecture.build(header.shape, len(header.classes))
        given = header.architecture.normalisation()
    except ForeshotError as error:
        raise ForeshotError(f"{path}: {error}") from error
    channels = torch.empty(header.shape[0] if given is None else len(given[0]), device="meta")
    return Normalized(network, channels, channels)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _check_fit(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        wanted = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        if name not in found:
            raise ForeshotError(f"{path}: expected {wanted}, found no such tensor")
        if (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape):
            what = f"{found[name].dtype} {tuple(found[name].shape)}"
            raise ForeshotError(f"{path}: expected {wanted}, found {what}")
    for name in sorted(found.keys() - expected.keys()):
        raise ForeshotError(f"{path}: expected no tensor {name}, found one")
