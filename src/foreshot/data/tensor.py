"""Ready-made tensors in safetensors files."""

import json
from pathlib import Path
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.files import replacing
from foreshot.data.mapped import Again, held
from foreshot.errors import ForeshotError, printable
from foreshot.files import safe_opened

DTYPES = {"images": "U8", "labels": "I64"}
NAMED = 3
"""Tensors that an error names."""
MOST_UNNAMED = 1 << 16
"""Classes without names, so that a broken label cannot ask for 2**63 of them."""


class TensorFile(Dataset):
    """Your own tensors: a safetensors file for each split.

    A file holds `images`, uint8 (N, C, H, W), and `labels`, int64 (N,), which only the training set
    may lack; its metadata may hold `classes`, a JSON list of names, without which the classes are
    called by their numbers. `save_images` writes such files. Images that a quarter of the memory
    does not hold are mapped from the file, which then may not change while it is in use.

    Args:
        path: the training set, a .safetensors file.
        test_path: the test set, a .safetensors file.
    """

    name: Literal["tensor"] = "tensor"
    path: Path
    test_path: Path

    def load(self, cache: Path) -> Splits:  # noqa: ARG002
        images, labels, names = read(self.path)
        test_images, test_labels, test_names = read(self.test_path)
        if test_labels is None:
            raise ForeshotError(f"{self.test_path}: expected a tensor 'labels', found none")
        if images.shape[1:] != test_images.shape[1:]:
            shapes = f"{tuple(images.shape[1:])}, found {tuple(test_images.shape[1:])}"
            raise ForeshotError(f"{self.test_path}: expected images of the training shape {shapes}")
        if names and test_names and names != test_names:
            raise ForeshotError(
                f"{self.test_path}: expected the classes {names}, found {test_names}"
            )
        highest = max(int(given.max()) for given in (labels, test_labels) if given is not None)
        classes = names or test_names or tuple(map(str, range(min(highest + 1, MOST_UNNAMED))))
        if highest >= len(classes):
            files = f"{self.path}, {self.test_path}"
            raise ForeshotError(f"{files}: expected labels below {len(classes)}, found {highest}")
        return Splits(
            ImageSet(images, labels, classes, _again(self.path, images)),
            ImageSet(test_images, test_labels, classes, _again(self.test_path, test_images)),
        )


def read(path: Path) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """The images, the labels or None, and the class names (none if not given) in a file."""
    tensors: dict[str, Tensor] = {}
    with safe_opened(path) as file:
        keys = list(file.keys())
        for key in DTYPES.keys() & keys:
            stored = file.get_slice(key).get_dtype()
            if stored != DTYPES[key]:
                raise ForeshotError(f"{path}: expected {key} {DTYPES[key]}, found {stored}")
            tensors[key] = file.get_tensor(key)
            if held(tensors[key].shape):  # what is mapped from the file would change with it
                tensors[key] = tensors[key].clone()
        about = file.metadata() or {}
    try:
        classes = json.loads(about.get("classes", "[]"))
    except (ValueError, RecursionError) as error:
        raise ForeshotError(f"{path}: expected 'classes' to be JSON: {error}") from None
    if "images" not in tensors:
        some = ", ".join(sorted(keys)[:NAMED]) or "none"
        more = f" and {len(keys) - NAMED} others" if len(keys) > NAMED else ""
        raise ForeshotError(printable(f"{path}: expected a tensor 'images', found {some}{more}"))
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ForeshotError(f"{path}: expected 'classes' to be a JSON list of names")
    images, labels = tensors["images"], tensors.get("labels")
    if images.ndim != 4 or not images.numel():
        raise ForeshotError(f"{path}: expected images (N, C, H, W), found {tuple(images.shape)}")
    if labels is not None and labels.shape != images.shape[:1]:
        found = tuple(labels.shape)
        raise ForeshotError(f"{path}: expected labels ({len(images)},), found {found}")
    if labels is not None and int(labels.min()) < 0:
        raise ForeshotError(f"{path}: expected labels from 0, found {int(labels.min())}")
    return images, labels, tuple(classes)


def _again(path: Path, images: Tensor) -> Again | None:
    """How to map the images of a file once more; None if they are held in memory."""
    return None if held(images.shape) else lambda: read(path)[0]


def save_images(path: Path, images: ImageSet) -> None:
    """Writes a set to a file that `TensorFile` reads."""
    tensors = {"images": images.images.contiguous()}
    if images.labels is not None:
        tensors["labels"] = images.labels.contiguous()
    with replacing(path) as part:
        part.write_bytes(save(tensors, {"classes": json.dumps(images.classes)}))
