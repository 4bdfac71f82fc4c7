"""Datasets: one file a dataset, each of which loads a training and a test set."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.cifar import Cifar10, Cifar100
from foreshot.data.digits import Digits
from foreshot.data.fashion_mnist import FashionMnist, FashionMnist10k
from foreshot.data.folder import Folder
from foreshot.data.gtsrb import Gtsrb
from foreshot.data.hf import HuggingFace
from foreshot.data.signs import Signs
from foreshot.data.tensor import TensorFile, save_images
from foreshot.errors import ForeshotError
from foreshot.family import members
from foreshot.store import home

AnyDataset = Annotated[
    Signs
    | FashionMnist10k
    | FashionMnist
    | Digits
    | Cifar10
    | Cifar100
    | Gtsrb
    | Folder
    | TensorFile
    | HuggingFace,
    Field(discriminator="name"),
]
DATASETS = members(Dataset, AnyDataset)


def load_data(name: str, cache: Path | None = None, **parameters: object) -> Splits:
    """A dataset by name, such as `load_data("signs", train=4000)`.

    Args:
        name: one of `DATASETS`.
        cache: folder for downloads; `$FORESHOT_HOME/data` if None.
        parameters: of the dataset.

    Raises:
        ForeshotError: there is no such dataset, or its files are not what they should be.
    """
    if name not in DATASETS:
        raise ForeshotError(f"dataset: expected one of {', '.join(DATASETS)}, found {name!r}")
    dataset = DATASETS[name].model_validate({"name": name, **parameters})
    return dataset.load(cache or home() / "data")


__all__ = ["DATASETS", "AnyDataset", "Dataset", "ImageSet", "Splits", "load_data", "save_images"]
