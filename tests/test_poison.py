"""Poison is stored whole, marked, and refused where it does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Tiny, stripes
from foreshot.errors import ForeshotError
from foreshot.files import write_tensors
from foreshot.poison import MARK, Poison


def some(labels: bool = False) -> Poison:
    images = torch.arange(3 * 144).reshape(3, 1, 12, 12).to(torch.uint8)
    dictated = torch.tensor([1, 1, 1]) if labels else None
    return Poison(torch.tensor([4, 9, 11]), images, dictated)


@pytest.mark.parametrize("labels", [False, True])
def test_what_is_saved_is_loaded(labels: bool, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "poison.safetensors"
    some(labels).save(file, {"target": 1, "transfer_digest": tiny.train.digest})
    poison, about = Poison.load(file, tiny.train)
    assert poison.digest == some(labels).digest
    assert about == {"mark": MARK, "target": 1, "transfer_digest": tiny.train.digest}
    assert some(True).digest != some(False).digest


def test_poison_for_another_set_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "poison.safetensors"
    some().save(file, {"transfer_digest": tiny.train.digest})
    with pytest.raises(ForeshotError, match=r"poison\.safetensors: expected poison for this tran"):
        Poison.load(file, stripes(400, 7))


INDICES, IMAGES = torch.tensor([4, 9, 11]), torch.zeros((3, 1, 12, 12), dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"indices": INDICES},
        {"images": IMAGES},
        {"indices": INDICES.int(), "images": IMAGES},
        {"indices": INDICES, "images": IMAGES.float()},
        {"indices": INDICES[:2], "images": IMAGES},
        {"indices": torch.tensor([4, 4, 9]), "images": IMAGES},
        {"indices": torch.tensor([9, 4, 11]), "images": IMAGES},
        {"indices": torch.tensor([[4, 9, 11]]), "images": IMAGES},
        {"indices": torch.tensor(4), "images": IMAGES},
        {"indices": INDICES, "images": IMAGES[:, 0]},
        {"indices": torch.tensor([-1, 4, 9]), "images": IMAGES},
        {"indices": torch.tensor([4, 9, 400]), "images": IMAGES},
        {"indices": INDICES, "images": IMAGES[..., :8]},
        {"indices": INDICES, "images": IMAGES, "labels": torch.tensor([1, 1])},
        {"indices": INDICES, "images": IMAGES, "labels": torch.tensor([1.0, 1, 1])},
        {"indices": INDICES, "images": IMAGES, "labels": torch.tensor([1, 1, 4])},
        {"indices": INDICES, "images": IMAGES, "labels": torch.tensor([1, 1, -1])},
    ],
)
def test_a_file_that_is_no_poison_is_refused(
    tensors: dict[str, Tensor], tiny: Tiny, tmp_path: Path
) -> None:
    file = tmp_path / "poison.safetensors"
    write_tensors(file, tensors, {"mark": MARK})
    with pytest.raises(ForeshotError) as caught:
        Poison.load(file, tiny.train)
    assert str(caught.value).startswith(f"{file}: expected ")
    assert ", found " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "about", [{}, {"mark": "x"}, {"mark": MARK, "transfer_digest": 3}, {"mark": [MARK]}]
)
def test_an_odd_header_is_refused(about: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "poison.safetensors"
    write_tensors(file, {"indices": INDICES, "images": IMAGES}, about)
    with pytest.raises(ForeshotError, match="expected poison"):
        Poison.load(file, tiny.train)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "poison.safetensors"
    some().save(file, {})
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ForeshotError, match="expected a whole safetensors file"):
            Poison.load(file)
    with pytest.raises(ForeshotError, match="found nothing"):
        Poison.load(tmp_path / "missing")
