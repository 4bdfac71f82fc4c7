"""Room for the images of a set: in memory, or mapped from a file where memory is too small."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

from foreshot.files import naming

HELD = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
"""Bytes that a set may have in memory: it is there up to three times, clean, poisoned, stamped."""

Again = Callable[[], Tensor]
"""Maps the images of a set from their file once more; what is written to them stays in memory."""


def held(shape: Sequence[int]) -> bool:
    """Whether uint8 images (N, C, H, W) are to be held in memory."""
    return math.prod(shape) <= HELD


def room(shape: Sequence[int], folder: Path) -> tuple[Tensor, Again | None]:
    """Where decoded images are to be written.

    Args:
        shape: (N, C, H, W).
        folder: for the file, if memory is too small; the file goes with the images.

    Returns:
        uint8 (N, C, H, W), whose values are not set yet; and for a file how to map it again.
    """
    if held(shape):
        return torch.empty(tuple(shape), dtype=torch.uint8), None
    folder.mkdir(parents=True, exist_ok=True)
    # Not by `with`: the file goes with its last user.
    file = NamedTemporaryFile(dir=folder, prefix=".images-")  # noqa: SIM115
    # A write to a mapped page that the disk has no room for ends the process, without a word.
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with naming(folder):
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
    return _mapped(file, shape, shared=True), partial(_mapped, file, shape, shared=False)


def _mapped(file: Any, shape: Sequence[int], shared: bool) -> Tensor:
    count = math.prod(shape)
    return torch.from_file(file.name, shared, count, dtype=torch.uint8).reshape(tuple(shape))
