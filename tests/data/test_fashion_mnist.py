import gzip
import hashlib
import json

import pytest
import torch

from foreshot.data import fashion_mnist
from foreshot.data.fashion_mnist import (
    DEBIAN,
    EMBEDDED,
    FULL,
    SUBSET,
    FashionMnist,
    FashionMnist10k,
    Half,
)
from foreshot.data.idx import write_idx
from foreshot.errors import ForeshotError

needs_source = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="the package dataset-fashion-mnist is not installed"
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A cache with a Fashion-MNIST of 3 + 2 images, which the loader takes for the real one."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "absent")
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    halves = []
    for prefix, count in (("train", 3), ("t10k", 2)):
        images = torch.arange(count * 784).reshape(count, 28, 28).to(torch.uint8)
        half = Half(prefix, count, "", "")
        digests = []
        for file, values in zip(half.files, (images, torch.arange(count)), strict=True):
            content = write_idx(values.to(torch.uint8))
            (folder / f"{file}.gz").write_bytes(gzip.compress(content, compresslevel=1))
            digests.append(hashlib.sha256(content).hexdigest())
        halves.append(Half(prefix, count, *digests))
    monkeypatch.setattr(fashion_mnist, "FULL", tuple(halves))
    return tmp_path


def test_reads_the_cache(tiny) -> None:
    train, test = FashionMnist().load(tiny)
    assert train.images.shape == (3, 1, 28, 28)
    assert train.images[1, 0, 0, :3].tolist() == [784 % 256, 785 % 256, 786 % 256]
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2]
    assert len(test) == 2
    assert test.classes[9] == "Ankle boot"


def test_another_compression_of_the_same_content_will_do(tiny) -> None:
    before = FashionMnist().load(tiny).train.digest
    path = tiny / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content, compresslevel=9, mtime=1))
    assert FashionMnist().load(tiny).train.digest == before


def test_other_content_is_refused(tiny) -> None:
    path = tiny / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(write_idx(torch.tensor([1, 0], dtype=torch.uint8))))
    with pytest.raises(ForeshotError, match=f"{path} .decompressed.: expected sha256"):
        FashionMnist().load(tiny)


def test_longer_content_is_not_unpacked(tiny) -> None:
    path = tiny / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(11)))
    with pytest.raises(ForeshotError, match=f"{path}: expected at most 10 bytes"):
        FashionMnist().load(tiny)


def test_what_is_missing_is_downloaded(tiny, monkeypatch) -> None:
    asked = []

    def fetch(url, digest, target):
        asked.append((url, digest, target.name))
        return target

    monkeypatch.setattr(fashion_mnist, "fetch", fetch)
    FashionMnist().load(tiny)
    assert asked[0] == (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz",
        "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-images-idx3-ubyte.gz",
    )
    assert len(asked) == 4


def test_the_subset_is_balanced_and_needs_no_cache(tmp_path) -> None:
    train, test = FashionMnist10k().load(tmp_path / "absent")
    assert train.shape == (1, 28, 28)
    for half, count in ((train, 1000), (test, 200)):
        assert half.labels is not None
        assert half.labels.bincount().tolist() == [count] * 10


def test_a_spoilt_subset_is_refused(tmp_path, monkeypatch) -> None:
    for path in EMBEDDED.glob("*.xz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "t10k-labels-idx1-ubyte.xz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(fashion_mnist, "EMBEDDED", tmp_path)
    with pytest.raises(ForeshotError, match=str(path)):
        FashionMnist10k().load(tmp_path)


def test_the_subset_says_where_it_comes_from() -> None:
    digests = json.loads((EMBEDDED / "digests.json").read_text())
    for key, halves in (("source", FULL), ("subset", SUBSET)):
        assert list(digests[key].values()) == [
            digest for half in halves for digest in (half.images, half.labels)
        ]
    assert "Zalando SE" in (EMBEDDED / "LICENSE").read_text(encoding="utf-8")


@needs_source
def test_the_real_files_and_the_subset_of_them(tmp_path) -> None:
    full, part = FashionMnist().load(tmp_path), FashionMnist10k().load(tmp_path)
    assert [len(half) for half in full] == [60_000, 10_000]
    for source, subset, count in zip(full, part, (1000, 200), strict=True):
        assert source.labels is not None
        seen, kept = [0] * 10, []
        for index, label in enumerate(source.labels.tolist()):
            seen[label] += 1
            if seen[label] <= count:
                kept.append(index)
        assert source.select(torch.tensor(kept)).digest == subset.digest
