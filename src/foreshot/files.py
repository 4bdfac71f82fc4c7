"""Files that are whole or not there: atomic writes, digests, and safetensors with JSON metadata."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from foreshot.errors import ForeshotError
from foreshot.extras import imported

DIGEST = "foreshot-sha256"
PART = ".part"
"""How the names of files end that are being written."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that at any moment it is either the old one or the new one, whole."""
    with replacing(path) as part:
        part.write_bytes(data)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new file beside `target` that takes its place, safe on disk, if the block succeeds."""
    if target.is_dir():
        raise ForeshotError(f"{target}: expected a file or none yet, found a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}{PART}")
    try:
        with naming(target):
            yield part
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
        part.replace(target)
        sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes what processes left in a folder that were killed while they wrote into it."""
    for part in folder.rglob(f".*{PART}"):
        if abandoned(part):
            part.unlink(missing_ok=True)


def abandoned(part: Path) -> bool:
    """Whether no process is there any more to finish what is in the making."""
    writer = part.name.split(".")[-2]
    return not (writer.isdecimal() and _alive(int(writer)))


def _alive(process: int) -> bool:
    """Whether a process of this machine is there, be it another user's."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which file it was that could not be written: of a full disk the system does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, before the work is done."""
    path = folder.absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ForeshotError(f"{folder}: expected a folder or none yet, found {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ForeshotError(f"{folder}: expected a folder to write to, may not write to {there}")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock that the file stands for; the system releases it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table of rows with the same keys, atomically.

    Raises:
        ForeshotError: there is no pyarrow.
    """
    arrow = imported("pyarrow", "parquet", path.name)
    parquet = imported("pyarrow.parquet", "parquet", path.name)
    with replacing(path) as part:
        parquet.write_table(arrow.Table.from_pylist(list(rows)), part)


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
    """Writes a safetensors file, atomically; each value of `about` becomes JSON in its metadata.

    Its metadata also holds a digest of all the rest, by which `read_tensors` knows it again.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    metadata[DIGEST] = _digest(contiguous, metadata)
    write_bytes(path, _in_order(save(contiguous, metadata)))


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return sha256(f"{sorted(metadata.items())} {tensors_digest(tensors)}".encode()).hexdigest()


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: safetensors writes it in random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


@contextmanager
def safe_opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it, until the block ends, is one sentence."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        found = "one that cannot be read" if path.exists() else "nothing"
        raise ForeshotError(f"{path}: expected a safetensors file, found {found}") from None
    except (SafetensorError, OSError, ValueError) as error:
        if _pickled(path):
            raise ForeshotError(
                f"{path}: expected a safetensors file, found a pickle, which could run anything; "
                "safetensors.torch.save_file writes its state_dict as one"
            ) from None
        raise ForeshotError(f"{path}: expected a whole safetensors file: {error}") from None


def _pickled(path: Path) -> bool:
    """Whether a file is one of `torch.save`'s, of the new kind or the old one."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(512)
    # A safetensors file begins with the length of its header: eight bytes, the last four zero.
    new, old = b"data.pkl" in start, start[:1] == b"\x80" and any(start[4:8])
    return (start.startswith(b"PK") and new) or old


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file: its tensors, and its metadata with JSON values parsed.

    Raises:
        ForeshotError: the file is not there, not a whole safetensors file, or was written by
            `write_tensors` and has changed.
    """
    with safe_opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = metadata.pop(DIGEST, None)
    if expected is not None and (found := _digest(tensors, metadata)) != expected:
        raise ForeshotError(f"{path}: expected digest {expected[:12]}, found {found[:12]}")
    return tensors, {key: _parsed(value) for key, value in metadata.items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, by name."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


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
