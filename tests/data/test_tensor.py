from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foreshot.data.base import ImageSet
from foreshot.data.tensor import TensorFile, save_images
from foreshot.errors import ForeshotError

IMAGES = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
LABELS = torch.tensor([1, 0])


def store(path: Path, classes: str | None = None, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path, None if classes is None else {"classes": classes})
    return path


@pytest.fixture
def test_path(tmp_path) -> Path:
    return store(tmp_path / "test.safetensors", images=IMAGES, labels=LABELS)


def test_what_is_saved_is_loaded(tmp_path) -> None:
    train = ImageSet(IMAGES, LABELS, ("cat", "Straße"))
    test = train.select(torch.tensor([1]))
    for name, half in (("train", train), ("test", test)):
        save_images(tmp_path / name, half)
    loaded = TensorFile(path=tmp_path / "train", test_path=tmp_path / "test").load(Path())
    assert [half.digest for half in loaded] == [train.digest, test.digest]


def test_saving_twice_gives_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        save_images(tmp_path / name, ImageSet(IMAGES, LABELS, ("cat", "dog")))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_unlabelled_training_set_takes_the_classes_of_the_test_set(tmp_path, test_path) -> None:
    save_images(tmp_path / "train", ImageSet(IMAGES, None, ()))
    train, test = TensorFile(path=tmp_path / "train", test_path=test_path).load(Path())
    assert train.labels is None
    assert torch.equal(train.images, IMAGES)
    assert train.classes == test.classes == ("0", "1")


def test_what_is_loaded_does_not_change_with_the_file(tmp_path, test_path) -> None:
    path = store(tmp_path / "train", images=IMAGES.clone(), labels=LABELS)
    train, _ = TensorFile(path=path, test_path=test_path).load(Path())
    with path.open("r+b") as stream:
        stream.seek(-24, 2)
        stream.write(bytes(24))
    assert torch.equal(train.images, IMAGES)


@pytest.mark.parametrize(
    ("tensors", "classes", "complaint"),
    [
        ({"labels": LABELS}, None, r"expected a tensor 'images', found labels$"),
        ({"images": IMAGES.float(), "labels": LABELS}, None, "images U8, found F32"),
        ({"images": IMAGES[0], "labels": LABELS}, None, r"\(N, C, H, W\), found \(3, 2, 2\)"),
        ({"images": IMAGES[:0], "labels": LABELS}, None, r"found \(0, 3, 2, 2\)"),
        ({"images": IMAGES, "labels": LABELS.int()}, None, "labels I64, found I32"),
        ({"images": IMAGES, "labels": LABELS[:1].clone()}, None, r"labels \(2,\), found \(1,\)"),
        ({"images": IMAGES, "labels": LABELS[:0].clone()}, None, r"labels \(2,\), found \(0,\)"),
        ({"images": IMAGES, "labels": LABELS - 1}, None, "labels from 0, found -1"),
        ({"images": IMAGES, "labels": LABELS + 2**40}, None, "labels below 65536, found"),
        ({"images": IMAGES, "labels": LABELS + 2}, '["a", "b"]', "labels below 2, found 3"),
        ({"images": IMAGES[:, :1].clone()}, None, r"training shape \(1, 2, 2\), found \(3, 2, 2\)"),
        ({"images": IMAGES, "labels": LABELS}, "a, b", "expected 'classes' to be JSON"),
        ({"images": IMAGES, "labels": LABELS}, "[" * 100_000, "expected 'classes' to be JSON"),
        ({"images": IMAGES, "labels": LABELS}, '{"a": 1}', "a JSON list of names"),
        ({"images": IMAGES, "labels": LABELS}, "[1, 2]", "a JSON list of names"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, test_path, tensors, classes, complaint) -> None:
    path = store(tmp_path / "train.safetensors", classes, **tensors)
    with pytest.raises(ForeshotError, match=f"safetensors: .*{complaint}"):
        TensorFile(path=path, test_path=test_path).load(Path())


def test_the_test_set_needs_labels_and_the_same_classes(tmp_path) -> None:
    path = store(tmp_path / "train", '["a", "b"]', images=IMAGES, labels=LABELS)
    bare = store(tmp_path / "bare", images=IMAGES)
    with pytest.raises(ForeshotError, match="bare: expected a tensor 'labels', found none"):
        TensorFile(path=path, test_path=bare).load(Path())
    other = store(tmp_path / "other", '["b", "a"]', images=IMAGES, labels=LABELS)
    with pytest.raises(ForeshotError, match=r"other: expected the classes .'a', 'b'."):
        TensorFile(path=path, test_path=other).load(Path())


def test_a_missing_file_is_named(tmp_path, test_path) -> None:
    with pytest.raises(ForeshotError, match="nowhere: expected a safetensors file"):
        TensorFile(path=tmp_path / "nowhere", test_path=test_path).load(Path())
