from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from foreshot.data import DATASETS, AnyDataset
from foreshot.data.folder import Folder


def test_every_dataset_goes_by_its_name() -> None:
    assert list(DATASETS) == [
        *("signs", "fashion-mnist-10k", "fashion-mnist", "digits", "cifar10", "cifar100"),
        *("gtsrb", "folder", "tensor", "hf"),
    ]
    for name, kind in DATASETS.items():
        assert kind.model_fields["name"].default == name
        assert kind.summary().endswith(".")


def test_a_config_picks_a_dataset_by_name() -> None:
    pick = TypeAdapter(AnyDataset)
    picked = pick.validate_python({"name": "folder", "root": "pictures", "size": 64})
    assert picked == Folder(root=Path("pictures"), size=64)
    with pytest.raises(ValidationError, match="mnist-of-cats"):
        pick.validate_python({"name": "mnist-of-cats"})
    with pytest.raises(ValidationError, match="colour"):
        pick.validate_python({"name": "digits", "colour": True})
