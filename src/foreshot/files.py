"""Files that are whole or not there: atomic writes, digests, and safetensors with JSON metadata."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from foreshot.errors import ForeshotError


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that at any moment it is either the old one or the new one, whole."""
    with replacing(path) as part:
        part.write_bytes(data)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new file beside `target` that takes its place, safe on disk, if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
        sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ForeshotError: the file is not there or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ForeshotError(f"{path}: expected a JSON file: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a safetensors file, atomically; each value of `about` becomes JSON in its metadata."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, {key: json.dumps(value) for key, value in about.items()})
    write_bytes(path, _in_order(data))


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: safetensors writes it in random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file: its tensors, and its metadata with JSON values parsed.

    Raises:
        ForeshotError: the file is not there or not a whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            about = {key: _parsed(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise ForeshotError(f"{path}: expected a safetensors file, found nothing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ForeshotError(f"{path}: expected a whole safetensors file: {error}") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    plain = tensor.detach().cpu().contiguous()
    # A tensor of one element counts as contiguous whatever its strides are.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
