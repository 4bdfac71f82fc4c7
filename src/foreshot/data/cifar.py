"""CIFAR-10 and CIFAR-100 from their binary versions."""

import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.files import check_digest, fetch, read_at_most, read_file
from foreshot.errors import ForeshotError

URL = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32
LARGEST = 50_000 * (PIXELS + 2)


@dataclass(frozen=True)
class Archive:
    """What is in an archive of the binary version, and what its bytes have to be.

    Args:
        file: name of the archive at `URL`.
        digest: SHA-256 of the archive.
        folder: the folder that the archive unpacks to.
        names: the file with one class name a line.
        classes: how many classes it names.
        label_bytes: labels before the pixels of a record; the last of them is the class.
        train: file -> SHA-256, for each file of the training set, in order.
        test: the same for the test set.
    """

    file: str
    digest: str
    folder: str
    names: str
    classes: int
    label_bytes: int
    train: Mapping[str, str]
    test: Mapping[str, str]

    def load(self, cache: Path) -> Splits:
        """Reads the unpacked folder in the cache if there is one, else the archive."""
        folder = cache / self.folder
        contents = dict(self._unpacked(folder) if folder.is_dir() else self._packed(cache))
        names = contents[self.names].decode(errors="replace").split()
        if len(names) != self.classes:
            raise ForeshotError(
                f"{self.names}: expected {self.classes} class names, found {len(names)}"
            )
        halves = (self.train, self.test)
        return Splits(*(self._join([contents[file] for file in half], names) for half in halves))

    def _unpacked(self, folder: Path) -> Iterator[tuple[str, bytes]]:
        yield self.names, read_file(folder / self.names, LARGEST)
        for file, digest in {**self.train, **self.test}.items():
            content = read_file(folder / file, LARGEST)
            check_digest(content, f"sha256:{digest}", str(folder / file))
            yield file, content

    def _packed(self, cache: Path) -> Iterator[tuple[str, bytes]]:
        path = fetch(URL + self.file, f"sha256:{self.digest}", cache / self.file)
        check_digest(path, f"sha256:{self.digest}", str(path))
        try:
            with tarfile.open(path, "r:gz") as tar:
                for file in (self.names, *self.train, *self.test):
                    member = tar.extractfile(f"{self.folder}/{file}")
                    if member is None:
                        raise ForeshotError(f"{path}: expected {file} to be a file")
                    yield file, read_at_most(member, LARGEST, f"{path}: {file}")
        except (KeyError, OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise ForeshotError(f"{path}: expected a whole archive, found {error}") from error

    def _join(self, contents: list[bytes], names: list[str]) -> ImageSet:
        return read_records(b"".join(contents), self.label_bytes, tuple(names), self.file)


def read_records(data: bytes, label_bytes: int, classes: tuple[str, ...], what: str) -> ImageSet:
    """Records of `label_bytes` labels, the last of which counts, and 3 x 32 x 32 pixels.

    Args:
        data: whole records, one after the other.
        label_bytes: 1 for CIFAR-10; 2, coarse and fine, for CIFAR-100.
        classes: the names of the classes.
        what: the name to give the data in an error.
    """
    size = label_bytes + PIXELS
    if not data or len(data) % size:
        raise ForeshotError(f"{what}: expected records of {size} bytes, found {len(data)} bytes")
    records = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(-1, size).copy())
    labels = records[:, label_bytes - 1].to(torch.int64)
    if int(labels.max()) >= len(classes):
        raise ForeshotError(
            f"{what}: expected labels up to {len(classes) - 1}, found {int(labels.max())}"
        )
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous()
    return ImageSet(images, labels, classes)


class Cifar10(Dataset):
    """CIFAR-10: 50,000 + 10,000 colour images of animals and vehicles, 32 x 32, 10 classes.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Reads
    ``cifar-10-binary.tar.gz``, or the ``cifar-10-batches-bin/`` that it unpacks to, in ``cifar10/``
    of the cache. The binary version is used, and not the better known pickles of the same images,
    because reading it can run no code.
    """

    name: Literal["cifar10"] = "cifar10"
    archive: ClassVar = Archive(
        file="cifar-10-binary.tar.gz",
        digest="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        names="batches.meta.txt",
        classes=10,
        label_bytes=1,
        train={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        },
        test={
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
    )

    def load(self, cache: Path) -> Splits:
        return self.archive.load(cache / self.name)


class Cifar100(Dataset):
    """CIFAR-100: 50,000 + 10,000 colour images of things, 32 x 32, 100 fine classes.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Reads
    ``cifar-100-binary.tar.gz``, or the ``cifar-100-binary/`` that it unpacks to, in ``cifar100/``
    of the cache; never the pickles, as for CIFAR-10. The 20 coarse labels are passed over.
    """

    name: Literal["cifar100"] = "cifar100"
    archive: ClassVar = Archive(
        file="cifar-100-binary.tar.gz",
        digest="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        names="fine_label_names.txt",
        classes=100,
        label_bytes=2,
        train={
            "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
        },
        test={
            "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
        },
    )

    def load(self, cache: Path) -> Splits:
        return self.archive.load(cache / self.name)
