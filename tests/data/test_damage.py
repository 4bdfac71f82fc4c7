"""A truncated file, or one with a byte changed, is refused or read; nothing else happens."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from foreshot.data.base import ImageSet
from foreshot.data.cifar import read_records
from foreshot.data.files import decompress, read_picture
from foreshot.data.idx import read_idx, write_idx
from foreshot.data.tensor import read
from foreshot.errors import ForeshotError

VALUES = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
CLASSES = tuple("abcdefghij")
QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")


def idx_gz(content: bytes, folder: Path) -> torch.Tensor:
    path = folder / "values.gz"
    path.write_bytes(content)
    return read_idx(decompress(path, 64), "values")


def safetensors(content: bytes, folder: Path) -> torch.Tensor:
    path = folder / "images.safetensors"
    path.write_bytes(content)
    images, labels, classes = read(path)
    assert labels is None or len(labels) == len(images)
    assert all(isinstance(name, str) for name in classes)
    return images


def cifar(content: bytes, folder: Path) -> torch.Tensor:
    records = read_records(content, 1, CLASSES, "batch")
    assert isinstance(records, ImageSet)
    return records.images


def picture(content: bytes, folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(read_picture(content, ("PNG", "JPEG", "WEBP"), "picture")))


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(VALUES[0].numpy()).save(stream, kind, exif=Image.Exif())
    return stream.getvalue()


IMAGES = VALUES.reshape(3, 1, 4, 4)
FORMATS: dict[str, tuple[bytes, Callable[[bytes, Path], torch.Tensor]]] = {
    "idx.gz": (gzip.compress(write_idx(VALUES), mtime=0), idx_gz),
    "safetensors": (
        save({"images": IMAGES, "labels": torch.tensor([0, 1, 2])}, {"classes": '["a", "b", "c"]'}),
        safetensors,
    ),
    "cifar": (bytes(range(2)) * 3073, cifar),
    "png": (encoded("PNG"), picture),
    "jpeg": (encoded("JPEG"), picture),
    "webp": (encoded("WEBP"), picture),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_files_are_read(kind, tmp_path) -> None:
    content, parse = FORMATS[kind]
    assert parse(content, tmp_path).numel() >= 16


@pytest.mark.parametrize("kind", FORMATS)
@QUICK
@given(data=st.data())
def test_a_changed_byte(kind, tmp_path, data) -> None:
    content, parse = FORMATS[kind]
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255))
    try:
        values = parse(content[:place] + bytes([byte]) + content[place + 1 :], tmp_path)
    except ForeshotError:
        return
    assert values.dtype == torch.uint8 or kind in ("png", "jpeg", "webp")
    if kind == "idx.gz":
        assert torch.equal(values, VALUES)


@pytest.mark.parametrize("kind", FORMATS)
@QUICK
@given(data=st.data())
def test_a_truncated_file(kind, tmp_path, data) -> None:
    content, parse = FORMATS[kind]
    kept = content[: data.draw(st.integers(0, len(content) - 1))]
    try:
        values = parse(kept, tmp_path)
    except ForeshotError:
        return
    assert kind in ("cifar", "png", "jpeg", "webp")  # whole records, or only the end mark is lost
    if kind == "cifar":
        assert len(values) * 3073 == len(kept)
    else:
        assert torch.equal(values, parse(content, tmp_path))
