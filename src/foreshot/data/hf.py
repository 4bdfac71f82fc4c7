"""Local data of Hugging Face `datasets`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.files import LARGEST_PICTURE, read_file
from foreshot.data.folder import SUFFIXES, decoded, tensor
from foreshot.data.mapped import room
from foreshot.errors import ForeshotError, brief, nearest
from foreshot.extras import imported

METADATA = (".csv", ".jsonl")
"""Files in which an imagefolder may describe its pictures."""


class HuggingFace(Dataset):
    """Local data of Hugging Face datasets: what it saved, parquet files, or an imagefolder.

    The path is what `save_to_disk` wrote, a folder with parquet files or one such file, or a
    folder of pictures with one subfolder a class; splits are found as `datasets` finds them.
    Nothing is downloaded, no code of a data set runs, and what a data set says elsewhere on the
    disk is not read. Pictures are PNG, JPEG or WebP, treated as those of the dataset `folder`.

    Args:
        path: the folder or file.
        train: the split to train and to distil on.
        test: the split to evaluate on; None holds out a part of the other one.
        test_share: that part, in (0, 1).
        image: the column of pictures.
        label: the column of labels: numbers, with or without names, or names.
        size: height and width of an image, in pixels, for which pictures are resized and cropped
            about their centre; None expects all pictures to have one size.
        channels: 1 for grey or 3 for colour.
    """

    name: Literal["hf"] = "hf"
    path: Path
    train: str = "train"
    test: str | None = "test"
    test_share: float = Field(default=0.2, gt=0, lt=1)
    image: str = "image"
    label: str = "label"
    size: int | None = Field(default=None, ge=8, le=1024)
    channels: Literal[1, 3] = 3

    def load(self, cache: Path) -> Splits:
        datasets = imported("datasets", "hf", "data hf")
        if not self.path.exists():
            raise ForeshotError(f"{self.path}: expected a folder or a file, found nothing")
        with TemporaryDirectory(prefix="foreshot-") as scratch, _quiet(datasets):
            try:
                parts = _opened(datasets, self.path.resolve(), scratch)
            except Exception as error:  # pyarrow and datasets raise all kinds
                wanted = "expected what datasets saved, parquet files or an imagefolder"
                raise ForeshotError(f"{self.path}: {wanted}, found {brief(error)}") from error
            train = self._part(datasets, parts, self.train)
            order, classes = self._classes(train)
            images = self._read(train, self.train, order, classes, cache)
            if self.test is None:
                return Splits(*images.cut(self.test_share, 0, "data.test_share"))
            test = self._part(datasets, parts, self.test)
            names = getattr(test.features[self.label], "names", None)
            if names not in (None, list(classes)):
                raise ForeshotError(
                    f"{self.path} ({self.test}): expected the classes of {self.train}, "
                    f"{', '.join(classes)}, found {', '.join(names)}"
                )
            splits = Splits(images, self._read(test, self.test, order, classes, cache))
        if splits.train.shape != splits.test.shape:
            raise ForeshotError(
                f"{self.path} ({self.test}): expected images of the shape {splits.train.shape}, "
                f"found {splits.test.shape}; the key size resizes them"
            )
        return splits

    def _part(self, datasets: ModuleType, parts: Mapping[str, Any], split: str) -> Any:
        """The split as datasets has it, with pictures as they are encoded."""
        if split not in parts:
            raise ForeshotError(f"{self.path}: found no split {split!r}; {nearest(split, parts)}")
        part, where = parts[split], f"{self.path} ({split})"
        for column in (self.image, self.label):
            if column not in part.features:
                hint = nearest(column, part.features)
                raise ForeshotError(f"{where}: found no column {column!r}; {hint}")
        if not len(part):
            raise ForeshotError(f"{where}: expected rows, found none")
        try:
            return part.cast_column(self.image, datasets.Image(decode=False))
        except Exception as error:
            found = part.features[self.image]
            raise ForeshotError(
                f"{where}: expected pictures in the column {self.image!r}, found {found}"
            ) from error

    def _classes(self, part: Any) -> tuple[Sequence[Any], tuple[str, ...]]:
        """Values of the column of labels in the order of the classes, and the classes' names."""
        names = getattr(part.features[self.label], "names", None)
        if names is not None:
            return range(len(names)), tuple(names)
        values = part[self.label]
        if {type(value) for value in values} not in ({int}, {str}):
            found = part.features[self.label]
            raise ForeshotError(
                f"{self.path} ({self.train}): expected numbers or names in the column "
                f"{self.label!r}, found {found}"
            )
        order = sorted(set(values))
        return order, tuple(map(str, order))

    def _read(
        self, part: Any, split: str, order: Sequence[Any], classes: tuple[str, ...], cache: Path
    ) -> ImageSet:
        place = {value: number for number, value in enumerate(order)}
        images, again, labels = None, None, torch.empty(len(part), dtype=torch.int64)
        for row, (cell, label) in enumerate(zip(part[self.image], part[self.label], strict=True)):
            what = f"{self.path} ({split}, row {row})"
            if label not in place:
                raise ForeshotError(f"{what}: expected a label of {self.train}, found {label!r}")
            content = self._content(cell or {}, what)
            picture = tensor(decoded(content, self.channels, self.size, what))
            if images is None:
                images, again = room((len(part), *picture.shape), cache)
            if picture.shape != images.shape[1:]:
                wanted, found = tuple(images.shape[2:]), tuple(picture.shape[1:])
                raise ForeshotError(
                    f"{what}: expected {wanted} pixels as in row 0, found {found}; "
                    "the key size resizes them"
                )
            images[row], labels[row] = picture, place[label]
        assert images is not None
        return ImageSet(images, labels, classes, again)

    def _content(self, cell: Mapping[str, Any], what: str) -> bytes:
        """The encoded picture, which may be a file in the folder, but none outside."""
        if cell.get("bytes") is not None:
            if len(cell["bytes"]) > LARGEST_PICTURE:
                raise ForeshotError(f"{what}: expected at most {LARGEST_PICTURE} bytes, found more")
            return cell["bytes"]
        if cell.get("path") is None:
            raise ForeshotError(f"{what}: expected a picture, found none")
        root = self.path.resolve()
        file = (root / cell["path"]).resolve()
        if not file.is_relative_to(root):
            raise ForeshotError(f"{what}: expected a picture in {self.path}, found {cell['path']}")
        return read_file(file, LARGEST_PICTURE)


def _opened(datasets: ModuleType, path: Path, scratch: str) -> Mapping[str, Any]:
    """The splits; what is not memory-mapped from where it lies is copied to `scratch`."""
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "state.json").exists():
        return {"train": datasets.load_from_disk(str(path))}
    tables = path.is_file() or any(path.rglob("*.parquet"))
    kind, builder = ("parquet", "Parquet") if tables else ("imagefolder", "ImageFolder")
    # Not by load_dataset, which reports its use and obeys addresses in a README.
    module = imported(f"datasets.packaged_modules.{kind}.{kind}", "hf", "data hf")
    root = path.parent if path.is_file() else path
    patterns = (
        {"train": [path.name]}
        if path.is_file()
        else datasets.data_files.get_data_patterns(str(root))
    )
    files = datasets.data_files.DataFilesDict.from_patterns(
        patterns,
        base_path=str(root),
        allowed_extensions=[".parquet"] if tables else [*SUFFIXES, *METADATA],
    )
    made = getattr(module, builder)(cache_dir=scratch, base_path=str(root), data_files=files)
    made.download_and_prepare()
    return made.as_dataset()


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Without progress bars."""
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
