"""A set of images as one uint8 tensor, and the family of datasets that load one."""

import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from foreshot.data.mapped import Again
from foreshot.errors import ForeshotError
from foreshot.family import Member
from foreshot.files import tensor_bytes
from foreshot.seeding import generator


def check_images(images: Tensor) -> None:
    """Refuses what is not uint8 (N, C, H, W), such as floats in [0, 1]."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ForeshotError(f"images: expected uint8 (N, C, H, W), found {found}")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with, perhaps, labels.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,) in [0, len(classes)), or None for an unlabelled set.
        classes: class names, in the order of the labels.
        again: maps `images` once more, if they are mapped from a file and not held in memory.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    again: Again | None = None

    def __post_init__(self) -> None:
        check_images(self.images)
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise ForeshotError(f"labels: expected int64 ({len(self.images)},), found {found}")
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(
            self.classes
        ):
            found = f"{int(self.labels.min())} to {int(self.labels.max())}"
            raise ForeshotError(f"labels: expected 0 to {len(self.classes) - 1}, found {found}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the shape, the class names, the images and the labels."""
        head = [list(self.images.shape), list(self.classes), self.labels is not None]
        digest = sha256(json.dumps(head).encode())
        for tensor in (self.images, self.labels):
            if tensor is not None:
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def replaced(self, indices: Tensor, images: Tensor) -> Self:
        """The set with other images at `indices`; labels stay those of the original images."""
        changed = self.images.clone() if self.again is None else self.again()
        changed[indices] = images
        return type(self)(changed, self.labels, self.classes)

    def select(self, indices: Tensor) -> Self:
        """The images at `indices` (int64 or bool mask), in that order."""
        labels = None if self.labels is None else self.labels[indices]
        return type(self)(self.images[indices], labels, self.classes)

    def joined(self, more: Self) -> Self:
        """The set with the images of another one of its shape and classes after its own."""
        pairs = (self.labels, more.labels)
        labels = [part for part in pairs if part is not None]
        return type(self)(
            torch.cat([self.images, more.images]),
            torch.cat(labels) if len(labels) == len(pairs) else None,
            self.classes,
        )

    def cut(self, share: float, seed: int, key: str) -> tuple[Self, Self]:
        """The set in two: what is left, and a random share of it.

        Args:
            share: of the images that is cut out, in (0, 1).
            seed: of the draw.
            key: the key of the config that asks for it; another one draws other images.

        Raises:
            ForeshotError: one of the two would be empty.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise ForeshotError(
                f"{key}: expected a share that leaves images on both sides of the split, "
                f"found {share:g} of {len(self)} images"
            )
        order = torch.randperm(len(self), generator=generator(seed, key))
        return self.select(order[count:].sort().values), self.select(order[:count])


class Splits(NamedTuple):
    """What a dataset loads: `train` is also the transfer set; `test` is only ever evaluated on."""

    train: ImageSet
    test: ImageSet

    def validation(self, share: float, seed: int) -> Self:
        """The training set split in two, so that settings are chosen without the test set.

        Args:
            share: of the training set that is held out, in (0, 1).
            seed: of the draw.

        Returns:
            What is left to train on, and the held-out images in place of the test set.

        Raises:
            ForeshotError: one of the two would be empty.
        """
        return type(self)(*self.train.cut(share, seed, "validation"))


class Dataset(Member):
    """A dataset by name. `load` returns the same bytes every time."""

    generated: ClassVar[bool] = False
    """Whether `load` computes its images, so that they are worth keeping, and reads none."""

    @abstractmethod
    def load(self, cache: Path) -> Splits:
        """Reads (or downloads into `cache`, or generates) the two splits.

        Raises:
            ForeshotError: a file is missing, truncated or not what its digest says.
        """
