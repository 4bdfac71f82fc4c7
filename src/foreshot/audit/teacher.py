"""The user's own model: a file that says what it is, or weights and an architecture's name."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from foreshot.attacks.folding import fold
from foreshot.compute import Compute
from foreshot.errors import ForeshotError, nearest
from foreshot.files import read_tensors
from foreshot.inference import place
from foreshot.models import ARCHITECTURES, Normalized, Transformers
from foreshot.models.checkpoint import load_model
from foreshot.models.foreign import Foreign
from foreshot.schema import sentence
from foreshot.seeding import drawing
from foreshot.yaml_text import read_yaml


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network and what it takes and says.

    Args:
        model: float (n, C, H, W) in [0, 1] -> logits (n, K), in eval mode.
        shape: (C, H, W) of the images that it takes.
        classes: class names, one a logit; numbers, if its file does not name them.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether its file names the classes."""
        return self.classes != tuple(map(str, range(len(self.classes))))


def load_teacher(
    path: Path,
    architecture: str | None,
    size: int,
    compute: Compute,
    option: str | None = "--architecture",
) -> Teacher:
    """A model file of foreshot's, or weights for a network of another package.

    Args:
        path: the file; for transformers the folder that `save_pretrained` wrote.
        architecture: None for foreshot's own files; else YAML of a network of another package,
            its name or a mapping with its fields, such as ``{name: timm, model: resnet18}``.
        size: side of the images that a network of another package is given, in pixels.
        compute: where to put it.
        option: which one would give an architecture, as errors say it; None if there is none.
    """
    if architecture is None:
        if path.is_dir():
            hint = f"; {option} transformers reads one of save_pretrained's" if option else ""
            raise ForeshotError(f"{path}: expected a model file, found a folder{hint}")
        hint = f"; {option} says what network weights are for" if option else ""
        model, _, shape, classes = load_model(path, hint)
        return _ready(model, shape, classes, compute)
    network = _parsed(architecture, path, option)
    file = path / "model.safetensors" if path.is_dir() else path
    classes = _classes(network, file, (3, size, size))
    with drawing(0, "audit"), torch.device("cpu"):  # what the weights do not overwrite
        built = network.build((3, size, size), len(classes))
    given = network.normalisation()
    if given is None:
        raise ForeshotError(
            f"{option}: expected the mean and std that the network's images are normalised with, "
            "found neither"
        )
    mean, std = map(torch.tensor, given)
    return _ready(Normalized(built, mean, std), (3, size, size), classes, compute)


def _ready(
    model: nn.Module, shape: tuple[int, int, int], classes: tuple[str, ...], compute: Compute
) -> Teacher:
    fold(model.eval())
    return Teacher(place(model, compute), shape, classes)


def _parsed(architecture: str, path: Path, option: str | None) -> Foreign:
    fields = read_yaml(architecture, str(option))
    fields = fields if isinstance(fields, dict) else {"name": fields}
    kinds = {key: kind for key, kind in ARCHITECTURES.items() if issubclass(kind, Foreign)}
    name = fields.get("name")
    if not isinstance(name, str) or name not in kinds:
        raise ForeshotError(f"{option}: found {name!r}; {nearest(name, kinds)}")
    try:
        return kinds[name].model_validate({**fields, "weights": str(path)})
    except ValidationError as error:
        raise ForeshotError(f"{option}: {sentence(error, kinds[name])}") from None


def _classes(network: Foreign, file: Path, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The classes by the weights: the one thing that differs from a network of one class.

    A classifier that does not fit would be left as it was drawn.
    """
    given, _ = read_tensors(file)
    with torch.device("meta"):
        own = network.build(shape, 1).state_dict()
    shapes = {key: given[key].shape for key in own if key in given}
    sizes = {shape[:1] for key, shape in shapes.items() if shape != own[key].shape}
    if len(sizes) != 1 or sizes == {torch.Size([])}:
        which = network.model_dump(include={"model"}).get("model", "")
        raise ForeshotError(
            f"{file}: expected weights of {f'{network.title} {which}'.strip()} for two classes or "
            "more, found those of another network"
        )
    ((count,),) = sizes
    config = json.loads(network.config) if isinstance(network, Transformers) else {}
    names = config.get("id2label")
    names = names if isinstance(names, dict) else {}
    return tuple(str(names.get(str(number), number)) for number in range(count))
