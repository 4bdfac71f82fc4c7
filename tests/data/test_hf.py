"""What Hugging Face datasets saved is read as it would read it, offline and within the folder."""

import io
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from foreshot.data.base import Splits
from foreshot.data.folder import Folder
from foreshot.data.hf import HuggingFace
from foreshot.errors import ForeshotError

datasets = import_module("datasets")
NAMES = ["dog", "cat"]
TRAIN, TEST = 6, 4


pytestmark = pytest.mark.usefixtures("offline")


def picture(level: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (level, level + 1, 30)).save(stream, kind)
    return stream.getvalue()


def table(rows: list[tuple[Any, Any]], labels: Any = None) -> Any:
    """Rows of (encoded picture or path, label)."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": labels or datasets.ClassLabel(names=NAMES)}
    )
    return datasets.Dataset.from_dict(
        {"image": [given for given, _ in rows], "label": [label for _, label in rows]}, features
    )


def part(count: int, first: int) -> Any:
    return table([(picture(first + index), index % 2) for index in range(count)])


def saved(folder: Path) -> Path:
    datasets.DatasetDict(train=part(TRAIN, 10), test=part(TEST, 100)).save_to_disk(folder)
    return folder


def parquet(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    part(TRAIN, 10).to_parquet(folder / "data/train-00000-of-00001.parquet")
    part(TEST, 100).to_parquet(folder / "data/test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files: https://example.org/x.parquet\n---\n"
    )
    return folder


def pictures(folder: Path) -> Path:
    for split, count, first in (("train", TRAIN, 10), ("test", TEST, 100)):
        for index in range(count):
            file = folder / split / NAMES[index % 2] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(first + index))
    return folder


def load(path: Path, **fields: Any) -> Splits:
    return HuggingFace(path=path, **fields).load(Path())


@pytest.mark.parametrize("make", [saved, parquet], ids=lambda make: make.__name__)
def test_tables(make: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "x")
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    train, test = load(path)
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == before
    assert train.classes == test.classes == ("dog", "cat")
    assert train.shape == test.shape == (3, 8, 8)
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert test.labels.tolist() == [0, 1, 0, 1]
    assert train.images[:, :, 3, 3].tolist() == [[10 + i, 11 + i, 30] for i in range(TRAIN)]
    assert test.images[:, 0, 7, 7].tolist() == [100, 101, 102, 103]
    assert [split.digest for split in load(path)] == [train.digest, test.digest]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_imagefolder_is_read_as_the_dataset_folder_reads_it(
    channels: Any, tmp_path: Path
) -> None:
    path = pictures(tmp_path / "x")
    (path / "train/cat/1.png").write_bytes(picture(77, (30, 20)))
    ours = load(path, size=16, channels=channels)
    folder = Folder(root=path / "train", test_root=path / "test", size=16, channels=channels)
    assert [s.digest for s in ours] == [s.digest for s in folder.load(Path())]


def test_one_file_and_a_part_held_out(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x") / "data/train-00000-of-00001.parquet"
    train, test = load(file, test=None, test_share=0.34)
    assert (len(train), len(test)) == (4, 2)
    levels = torch.cat([train.images, test.images])[:, 0, 0, 0].tolist()
    assert sorted(levels) == [10, 11, 12, 13, 14, 15]
    part(TRAIN, 10).save_to_disk(tmp_path / "single")
    again = load(tmp_path / "single", test=None, test_share=0.34)
    assert [s.digest for s in again] == [train.digest, test.digest]


@pytest.mark.parametrize(
    ("labels", "kind", "classes"),
    [
        (["b", "a", "b"], "string", ("a", "b")),
        ([3, 10, 3], "int64", ("3", "10")),
    ],
)
def test_labels_without_names(labels: list[Any], kind: str, classes: Any, tmp_path: Path) -> None:
    rows = [(picture(level), label) for level, label in zip((1, 2, 3), labels, strict=True)]
    whole = table(rows, datasets.Value(kind))
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "x")
    train, test = load(tmp_path / "x")
    assert train.classes == classes
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels.tolist() == [classes.index(str(label)) for label in labels]
    assert test.labels.tolist() == train.labels.tolist()[1:2]


def test_columns_and_splits_by_other_names(tmp_path: Path) -> None:
    whole = part(TRAIN, 10).rename_columns({"image": "img", "label": "fine"})
    datasets.DatasetDict(training=whole, validation=whole).save_to_disk(tmp_path / "x")
    train, _ = load(tmp_path / "x", train="training", test="validation", image="img", label="fine")
    assert len(train) == TRAIN
    with pytest.raises(ForeshotError, match="found no split 'train'; did you mean 'training'"):
        load(tmp_path / "x")
    with pytest.raises(ForeshotError, match="found no column 'image'; did you mean 'img'"):
        load(tmp_path / "x", train="training")


BAD_ROWS: dict[str, tuple[tuple[Any, Any], str]] = {
    "size": ((picture(1, (9, 8)), 1), r"\(8, 8\) pixels as in row 0, found \(8, 9\); the key size"),
    "truncated": ((picture(1)[:-40], 1), "expected a whole PNG"),
    "tiff": ((picture(1, kind="TIFF"), 1), "expected a whole PNG"),
    "nothing": ((None, 1), "expected a picture, found none"),
    "number": ((picture(1), 7), "expected a label of train, found 7"),
    "unlabelled": ((picture(1), None), "expected a label of train, found None"),
    "absolute": (("/etc/hostname", 1), "expected a picture in .*found /etc/hostname"),
    "outside": (("../y.png", 1), r"expected a picture in .*found \.\./y\.png"),
    "net": (("https://example.org/x.png", 1), r"x\.png: expected a readable file"),
}


@pytest.mark.parametrize("key", BAD_ROWS)
def test_rows_that_do_not_hold_a_picture_and_a_label(key: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[key]
    (tmp_path / "y.png").write_bytes(picture(1))
    (tmp_path / "x").mkdir()
    number = datasets.Value("int64")
    good, bad = (
        table([(picture(1), 0), (picture(1), 1)], number),
        table([(picture(1), 0), row], number),
    )
    for name, rows in (("train", good), ("test", bad)):
        # Not by datasets, which reads the files that a table names when it writes it.
        pq.write_table(rows.data.table, tmp_path / "x" / f"{name}.parquet")
    with pytest.raises(ForeshotError, match=message) as error:
        load(tmp_path / "x")
    assert key == "net" or "test, row 1" in str(error.value)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ForeshotError, match="nowhere: expected a folder or a file"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not so")
    for name in ("empty", "x.parquet"):
        with pytest.raises(ForeshotError, match=f"{name}: expected what datasets saved"):
            load(tmp_path / name)
    datasets.DatasetDict(train=part(2, 1), test=table([])).save_to_disk(tmp_path / "none")
    with pytest.raises(ForeshotError, match="none"):
        load(tmp_path / "none")
    words = table([("a", 0)]).remove_columns("image").add_column("image", [3.0])
    datasets.DatasetDict(train=words, test=words).save_to_disk(tmp_path / "words")
    with pytest.raises(ForeshotError, match="expected pictures in the column 'image', found Value"):
        load(tmp_path / "words")
    other = table([(picture(1), 0)], datasets.ClassLabel(names=["dog", "cow"]))
    datasets.DatasetDict(train=part(2, 1), test=other).save_to_disk(tmp_path / "other")
    with pytest.raises(ForeshotError, match=r"\(test\): expected the classes .* found dog, cow"):
        load(tmp_path / "other")
    floats = table([(picture(1), 0.5)], datasets.Value("float32"))
    datasets.DatasetDict(train=floats, test=floats).save_to_disk(tmp_path / "floats")
    with pytest.raises(ForeshotError, match=r"expected numbers or names .* found Value"):
        load(tmp_path / "floats")
    wide = table([(picture(1, (8, 9)), 0)])
    datasets.DatasetDict(train=part(2, 1), test=wide).save_to_disk(tmp_path / "wide")
    with pytest.raises(ForeshotError, match=r"\(test\): expected images of the shape \(3, 8, 8\)"):
        load(tmp_path / "wide")
    assert load(tmp_path / "wide", size=8).test.shape == (3, 8, 8)


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ForeshotError, match=r"package datasets \(pip install 'foreshot\[hf\]'\)"):
        load(tmp_path)


def test_grey(tmp_path: Path) -> None:
    train, _ = load(saved(tmp_path / "x"), channels=1)
    assert train.shape == (1, 8, 8)
    grey = np.asarray(Image.open(io.BytesIO(picture(10))).convert("L"))
    assert torch.equal(train.images[0, 0], torch.tensor(grey))
