"""Fashion-MNIST, and the balanced tenth of it that comes inside the package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.files import check_digest, decompress, fetch
from foreshot.data.idx import read_idx

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
EMBEDDED = Path(__file__).parent / "embedded" / "fashion-mnist-10k"


@dataclass(frozen=True)
class Half:
    """The two idx files of one split, and the SHA-256 of each once it is decompressed.

    The content is what is checked, so that a file which somebody compressed anew (as Debian does)
    is as good as the original.
    """

    prefix: str
    count: int
    images: str
    labels: str

    @property
    def files(self) -> tuple[str, str]:
        return f"{self.prefix}-images-idx3-ubyte", f"{self.prefix}-labels-idx1-ubyte"

    def read(self, images: Path, labels: Path) -> ImageSet:
        pixels = decompress(images, 16 + self.count * 28 * 28)
        check_digest(pixels, f"sha256:{self.images}", f"{images} (decompressed)")
        targets = decompress(labels, 8 + self.count)
        check_digest(targets, f"sha256:{self.labels}", f"{labels} (decompressed)")
        return ImageSet(
            read_idx(pixels, str(images)).unsqueeze(1),
            read_idx(targets, str(labels)).to(torch.int64),
            CLASSES,
        )


FULL = (
    Half(
        "train",
        60_000,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    Half(
        "t10k",
        10_000,
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
SUBSET = (
    Half(
        "train",
        10_000,
        "d33512cfdc636a0d8972818e6659995be209a88891df7fa2109d7895922c8985",
        "620cb8e3b9348037c5ff9a07b02d773ab165330e072dfd19e0d21c59f8042dcf",
    ),
    Half(
        "t10k",
        2_000,
        "15a92dd1e9b16ea361928086e77df4dfa890c255c00b5a8c8162c1040ce8eef1",
        "234596aeb6eb48133ec99a62541f90bc0728c9559a681f1e0638037462458f2c",
    ),
)
MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
"""Digests of the compressed files, as their publisher gives them; only downloads have to match."""


class FashionMnist(Dataset):
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28 x 28, 10 classes.

    Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", 2017, arXiv:1708.07747. Reads the files of Debian's dataset-fashion-mnist, or those
    in ``fashion-mnist/`` of the cache, or downloads them there.
    """

    name: Literal["fashion-mnist"] = "fashion-mnist"

    def load(self, cache: Path) -> Splits:
        return Splits(*(half.read(*(find(file, cache) for file in half.files)) for half in FULL))


def find(file: str, cache: Path) -> Path:
    """Where the compressed idx file lies, downloaded into the cache if it lies nowhere yet."""
    packaged = DEBIAN / f"{file}.gz"
    if packaged.exists():
        return packaged
    return fetch(f"{URL}{file}.gz", f"md5:{MD5[file]}", cache / "fashion-mnist" / packaged.name)


class FashionMnist10k(Dataset):
    """A balanced part of Fashion-MNIST that needs no download: 10,000 + 2,000 images.

    The first 1,000 training and the first 200 test images of each class, in the order of the
    original files, stored without loss in the package under Zalando's MIT licence;
    ``scripts/make_fashion_mnist_10k.py`` makes it again.
    """

    name: Literal["fashion-mnist-10k"] = "fashion-mnist-10k"

    def load(self, cache: Path) -> Splits:  # noqa: ARG002
        return Splits(*(half.read(*(EMBEDDED / f"{f}.xz" for f in half.files)) for half in SUBSET))
