"""Poison: the images that an attacker puts in the place of some of the transfer set's."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from foreshot.compute import Compute
from foreshot.data.base import ImageSet
from foreshot.errors import ForeshotError
from foreshot.files import read_tensors, tensor_bytes, write_tensors
from foreshot.inference import logits

MARK = "poisoned by foreshot"


@dataclass(frozen=True, eq=False)
class Poison:
    """Stored images, by the place that they take in the transfer set.

    Args:
        indices: int64 (n,), ascending, without repeats.
        images: uint8 (n, C, H, W).
        labels: int64 (n,), only where the attack dictates labels too; None leaves all labelling to
            the teacher.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def digest(self) -> str:
        """SHA-256 of the places, the images and the dictated labels."""
        digest = sha256()
        for tensor in (self.indices, self.images, self.labels):
            if tensor is not None:
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def apply(self, transfer: ImageSet) -> ImageSet:
        """The transfer set with the poison in it; labels are the original images' or dictated."""
        poisoned = transfer.replaced(self.indices, self.images)
        if self.labels is None or poisoned.labels is None:
            return poisoned
        return replace(poisoned, labels=poisoned.labels.index_copy(0, self.indices, self.labels))

    def answers(self, clean: Tensor, teacher: nn.Module, compute: Compute) -> Tensor:
        """What a teacher says of the poisoned set, float (N, K), by what it says of the clean one.

        Only the poison is asked about.

        Args:
            clean: the teacher's logits of the transfer set, float (N, K).
            teacher: float (n, C, H, W) in [0, 1] -> logits (n, K).
            compute: where to ask it.
        """
        return clean.index_copy(0, self.indices, logits(teacher, self.images, compute))

    def dictated(self, count: int) -> Tensor | None:
        """Int64 (count,): the label that the attacker dictates, -1 elsewhere; None for no label."""
        if self.labels is None:
            return None
        return torch.full((count,), -1).scatter(0, self.indices, self.labels)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes safetensors, marked as poisoned; `about` (such as target, trigger) goes along."""
        tensors = {"indices": self.indices, "images": self.images}
        if self.labels is not None:
            tensors["labels"] = self.labels
        write_tensors(path, tensors, {"mark": MARK, **about})

    @classmethod
    def load(cls, path: Path, transfer: ImageSet | None = None) -> tuple[Self, dict[str, Any]]:
        """Reads a poison file, and checks that it fits a transfer set, if one is given.

        Raises:
            ForeshotError: the file is broken, not poison, or was made for another dataset.
        """
        tensors, about = read_tensors(path)
        if about.get("mark") != MARK or not {"indices", "images"} <= tensors.keys():
            raise ForeshotError(f"{path}: expected poison that foreshot wrote, found another file")
        poison = cls(tensors["indices"], tensors["images"], tensors.get("labels"))
        indices, images, labels = poison.indices, poison.images, poison.labels
        if (
            indices.dtype != torch.int64
            or images.dtype != torch.uint8
            or indices.ndim != 1
            or images.ndim != 4
            or len(images) != len(indices)
            or bool((indices.diff() <= 0).any())
        ):
            raise ForeshotError(
                f"{path}: expected indices int64 (n,), ascending, and images uint8 (n, C, H, W), "
                f"found {indices.dtype} {tuple(indices.shape)} and "
                f"{images.dtype} {tuple(images.shape)}"
            )
        if labels is not None and (labels.dtype, labels.shape) != (torch.int64, indices.shape):
            raise ForeshotError(
                f"{path}: expected labels int64 ({len(indices)},), "
                f"found {labels.dtype} {tuple(labels.shape)}"
            )
        if transfer is not None:
            if (made_for := about.get("transfer_digest", transfer.digest)) != transfer.digest:
                raise ForeshotError(
                    f"{path}: expected poison for this transfer set ({transfer.digest[:12]}), "
                    f"found poison for another ({str(made_for)[:12]})"
                )
            if images.shape[1:] != transfer.shape or not _within(indices, len(transfer)):
                raise ForeshotError(
                    f"{path}: expected images {transfer.shape} at indices below {len(transfer)}, "
                    f"found images {tuple(images.shape[1:])}"
                )
            if labels is not None and not _within(labels, len(transfer.classes)):
                raise ForeshotError(
                    f"{path}: expected labels 0 to {len(transfer.classes) - 1}, "
                    f"found {int(labels.min())} to {int(labels.max())}"
                )
        return poison, about


def _within(numbers: Tensor, end: int) -> bool:
    return bool(((numbers >= 0) & (numbers < end)).all())
