import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from foreshot.data.folder import Folder
from foreshot.errors import ForeshotError


def put(path: Path, colour=(10, 20, 30), size=(8, 8), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


@pytest.fixture
def roots(tmp_path):
    """Training and test folders of two classes: cats are dark, dogs are light."""
    for split, count in (("train", 3), ("test", 1)):
        for name, level in (("dog", 200), ("cat", 50)):
            for index in range(count):
                put(tmp_path / split / name / f"{index}.png", (level, level + 1, level + index))
    return tmp_path / "train", tmp_path / "test"


def load(roots, **fields):
    return Folder(root=roots[0], test_root=roots[1], size=8, **fields).load(Path())


def test_classes_and_files_in_sorted_order(roots) -> None:
    train, test = load(roots)
    assert train.labels is not None
    assert test.labels is not None
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.images[:, :, 3, 3].tolist() == [
        [level, level + 1, level + index] for level in (50, 200) for index in range(3)
    ]
    assert test.labels.tolist() == [0, 1]


def test_grey(roots) -> None:
    train, _ = load(roots, channels=1)
    assert train.shape == (1, 8, 8)
    assert train.images[0].unique().tolist() == [round(0.299 * 50 + 0.587 * 51 + 0.114 * 50)]


def test_the_middle_of_a_wide_picture_is_kept(roots) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 120
    Image.fromarray(pixels).save(roots[0] / "cat" / "0.png")
    train, _ = load(roots)
    assert train.images[0, :, :, 1:-1].unique().tolist() == [120]
    assert train.images[0].float().mean() > 110  # the black sides only touch the outer columns


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 255, 0), [255, 255, 255]),
        ("RGBA", (0, 0, 255, 255), [0, 0, 255]),
        ("LA", (100, 255), [100, 100, 100]),
        ("P", 0, [0, 0, 0]),
        ("1", 1, [255, 255, 255]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 257 * 99, [99, 99, 99]),
    ],
)
def test_other_kinds_of_png(roots, mode, colour, expected) -> None:
    put(roots[0] / "cat" / "0.png", colour, mode=mode)
    train, _ = load(roots)
    assert train.images[0, :, 4, 4].tolist() == expected
    grey, _ = load(roots, channels=1)
    if len(set(expected)) == 1:
        assert grey.images[0].unique().tolist() == expected[:1]


def test_a_transparent_colour_becomes_white(roots) -> None:
    put(roots[0] / "cat" / "0.png", (1, 2, 3), transparency=(1, 2, 3))
    train, _ = load(roots)
    assert train.images[0].unique().tolist() == [255]


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".jpg", "RGB"), (".JPEG", "CMYK"), (".webp", "RGB"), (".WebP", "RGB")]
)
def test_jpeg_and_webp(roots, suffix, mode) -> None:
    colour = (0, 0, 0) if mode == "RGB" else (0, 0, 0, 255)
    put(roots[0] / "bird" / f"0{suffix}", colour, mode=mode)
    train, _ = load(roots)
    assert train.classes[0] == "bird"
    assert train.images[0].max() < 16


def test_hidden_and_other_files_are_passed_over(roots) -> None:
    before = load(roots).train.digest
    for path in (".DS_Store", "notes.txt", "cat/.0.png", "cat/notes.txt", ".git/x.png"):
        (roots[0] / path).parent.mkdir(exist_ok=True)
        (roots[0] / path).write_bytes(b"not a picture")
    assert load(roots).train.digest == before


def test_a_share_of_each_class_is_held_out(tmp_path) -> None:
    for name, count in (("cat", 10), ("mouse", 2)):
        for index in range(count):
            put(tmp_path / name / f"{index}.png", (len(name), index, 0))
    train, test = Folder(root=tmp_path, size=8, test_share=0.3).load(Path())
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels.bincount().tolist() == [7, 1]
    assert test.labels.bincount().tolist() == [3, 1]
    held = {tuple(image[:, 0, 0].tolist()) for image in test.images}
    kept = {tuple(image[:, 0, 0].tolist()) for image in train.images}
    assert len(held | kept) == 12
    # One more picture may take one place in the test set, and moves nothing else.
    put(tmp_path / "cat" / "10.png", (3, 10, 0))
    _, more = Folder(root=tmp_path, size=8, test_share=0.3).load(Path())
    assert len(held - {tuple(image[:, 0, 0].tolist()) for image in more.images}) <= 1


def test_links_may_not_lead_out(roots) -> None:
    outside = put(roots[0].parent / "secret.png")
    (roots[0] / "cat" / "link.png").symlink_to(outside)
    with pytest.raises(ForeshotError, match=r"cat/link\.png: expected to stay in .*/train"):
        load(roots)
    (roots[0] / "cat" / "link.png").unlink()
    (roots[0] / "mouse").symlink_to(roots[1] / "cat")
    with pytest.raises(ForeshotError, match="train/mouse: expected to stay"):
        load(roots)


def test_a_class_is_named_in_utf_8(roots) -> None:
    (roots[0] / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(ForeshotError, match=r"train/\\udcff: expected a class named in UTF-8"):
        load(roots)


def test_links_inside_are_followed(roots) -> None:
    (roots[0] / "cat" / "link.png").symlink_to(roots[0] / "cat" / "0.png")
    train, _ = load(roots)
    assert train.labels is not None
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("target", ["loop.png", "absent.png"])
def test_links_to_nothing_are_refused(roots, target) -> None:
    (roots[0] / "cat" / "loop.png").symlink_to(roots[0] / "cat" / target)
    with pytest.raises(ForeshotError, match="cat"):
        load(roots)


def test_broken_pictures_are_named(roots) -> None:
    path = roots[1] / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ForeshotError, match=f"{path}: expected a whole PNG or JPEG or WEBP image"):
        load(roots)


def test_a_picture_in_disguise_is_refused(roots) -> None:
    Image.new("RGB", (8, 8)).save(roots[0] / "cat" / "0.png", "TIFF")
    with pytest.raises(ForeshotError, match=r"cat/0\.png: expected a whole PNG"):
        load(roots)


def test_missing_and_empty_folders_are_named(roots, tmp_path) -> None:
    with pytest.raises(ForeshotError, match="nowhere: expected a readable folder"):
        Folder(root=tmp_path / "nowhere").load(Path())
    with pytest.raises(ForeshotError, match="cat: expected a folder for each class, found none"):
        Folder(root=roots[0] / "cat").load(Path())
    (roots[0] / "empty").mkdir()
    with pytest.raises(ForeshotError, match=r"train/empty: expected pictures .* found none"):
        load(roots)


def test_the_test_folder_may_not_bring_new_classes(roots) -> None:
    put(roots[1] / "bird" / "0.png")
    with pytest.raises(ForeshotError, match=r"test: expected the classes of .*train, found 'bird'"):
        load(roots)


def test_a_single_picture_cannot_be_split(tmp_path) -> None:
    put(tmp_path / "cat" / "0.png")
    with pytest.raises(ForeshotError, match="cat: expected two pictures"):
        Folder(root=tmp_path).load(Path())


@pytest.mark.parametrize("fields", [{"channels": 2}, {"size": 0}, {"test_share": 1.0}])
def test_fields_are_checked(fields) -> None:
    with pytest.raises(ValidationError):
        Folder(root=Path(), **fields)
