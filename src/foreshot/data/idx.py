"""The idx format of MNIST and Fashion-MNIST."""

import math
import struct

import numpy as np
import torch
from torch import Tensor

from foreshot.errors import ForeshotError

UINT8 = 0x08


def read_idx(data: bytes, what: str) -> Tensor:
    """The uint8 tensor in an idx file: two zero bytes, type, rank, big-endian sizes, then values.

    Args:
        data: the whole file, decompressed.
        what: the name to give the file in an error.
    """
    if len(data) < 4 or data[:3] != bytes((0, 0, UINT8)) or not data[3]:
        raise ForeshotError(f"{what}: expected idx bytes to open with 00 00 08, found {data[:4]!r}")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ForeshotError(f"{what}: expected an idx header of {header} bytes, found {len(data)}")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    if len(data) - header != math.prod(shape):
        found = len(data) - header
        raise ForeshotError(f"{what}: expected {math.prod(shape)} values {shape}, found {found}")
    try:
        return torch.from_numpy(np.frombuffer(data[header:], np.uint8).reshape(shape).copy())
    except ValueError as error:  # no values, of a rank or a size that there cannot be
        raise ForeshotError(f"{what}: expected an idx shape, found {error}") from error


def write_idx(values: Tensor) -> bytes:
    """The idx file that `read_idx` reads as `values` (uint8)."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, UINT8, values.ndim, *values.shape)
    return header + values.contiguous().numpy().tobytes()
