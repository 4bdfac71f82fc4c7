"""A folder of pictures with one subfolder for each class."""

from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.files import LARGEST_PICTURE, read_file, read_picture
from foreshot.data.mapped import room
from foreshot.errors import ForeshotError, printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")


class Picture(NamedTuple):
    """A file, and the class whose folder it lies in."""

    path: Path
    label: str

    @property
    def draw(self) -> bytes:
        """A digest of class and file name, by which pictures are picked for the test set."""
        return sha256(f"{self.label}/{self.path.name}".encode(errors="surrogateescape")).digest()


class Folder(Dataset):
    """Your own pictures: one subfolder for each class, PNG, JPEG or WebP.

    Pictures are turned upright, resized and cropped about their centre to a square. Transparent
    parts become white, 16-bit grey becomes 8-bit; animations are refused, and so is every link that
    leads out of the folder. Hidden files and other kinds of file are passed over.

    Args:
        root: the folder of the training set: ``root/class/picture.png``.
        test_root: the same for the test set; without it a part of `root` is held out.
        test_share: part of each class in `root` to hold out, in (0, 1), by a hash of the file name.
        size: height and width of an image, in pixels.
        channels: 1 for grey or 3 for colour.
    """

    name: Literal["folder"] = "folder"
    root: Path
    test_root: Path | None = None
    test_share: float = Field(default=0.2, gt=0, lt=1)
    size: int = Field(default=32, ge=8, le=1024)
    channels: Literal[1, 3] = 3

    def load(self, cache: Path) -> Splits:
        train = pictures(self.root)
        classes = tuple(dict.fromkeys(picture.label for picture in train))
        if self.test_root is None:
            train, test = hold_out(train, self.test_share)
        else:
            test = pictures(self.test_root)
            if unknown := {picture.label for picture in test} - set(classes):
                raise ForeshotError(
                    f"{self.test_root}: expected the classes of {self.root}, found {min(unknown)!r}"
                )
        return Splits(self._read(train, classes, cache), self._read(test, classes, cache))

    def _read(self, pictures: list[Picture], classes: tuple[str, ...], cache: Path) -> ImageSet:
        images, again = room((len(pictures), self.channels, self.size, self.size), cache)
        for slot, picture in zip(images, pictures, strict=True):
            content = read_file(picture.path, LARGEST_PICTURE)
            slot[:] = tensor(decoded(content, self.channels, self.size, str(picture.path)))
        labels = torch.tensor([classes.index(picture.label) for picture in pictures])
        return ImageSet(images, labels, classes, again)


def pictures(root: Path) -> list[Picture]:
    """The pictures in a folder of class folders, sorted by class and by name."""
    found = []
    for folder in visible(root, root):
        if not folder.is_dir():
            continue
        if folder.name != folder.name.encode(errors="replace").decode():
            raise ForeshotError(printable(f"{folder}: expected a class named in UTF-8"))
        mine = [path for path in visible(folder, root) if path.suffix.lower() in SUFFIXES]
        if not mine:
            kinds = ", ".join(SUFFIXES)
            raise ForeshotError(f"{folder}: expected pictures ({kinds}), found none")
        for path in mine:
            if not path.is_file():
                raise ForeshotError(f"{path}: expected a regular file, found something else")
        found += [Picture(path, folder.name) for path in mine]
    if not found:
        raise ForeshotError(f"{root}: expected a folder for each class, found none")
    return found


def visible(folder: Path, root: Path) -> list[Path]:
    """What lies in a folder and is not hidden, sorted by name; nothing may lead out of `root`."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        strays = [path for path in paths if not path.resolve().is_relative_to(root.resolve())]
    except (OSError, RuntimeError) as error:  # a RuntimeError is a loop of links
        raise ForeshotError(f"{folder}: expected a readable folder, found {error}") from error
    if strays:
        raise ForeshotError(f"{strays[0]}: expected to stay in {root}, found a link that leads out")
    return paths


def hold_out(found: list[Picture], share: float) -> tuple[list[Picture], list[Picture]]:
    """Training and test pictures; of each class, those with the lowest draws are for testing."""
    test: set[Picture] = set()
    for _, group in groupby(found, key=lambda picture: picture.label):
        mine = sorted(group, key=lambda picture: picture.draw)
        if len(mine) < 2:
            folder = mine[0].path.parent
            raise ForeshotError(f"{folder}: expected two pictures, to hold one out, found one")
        test |= set(mine[: min(max(round(share * len(mine)), 1), len(mine) - 1)])
    return [p for p in found if p not in test], [p for p in found if p in test]


def decoded(content: bytes, channels: int, size: int | None, what: str) -> Image.Image:
    """One picture, in grey or in colour.

    Args:
        content: the encoded picture.
        channels: 1 for grey or 3 for colour.
        size: side of the square that it is cropped and resized to; None leaves it as it is.
        what: the name to give the picture in an error.
    """
    picture = read_picture(content, FORMATS, what).convert("L" if channels == 1 else "RGB")
    if size is None:
        return picture
    return ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)


def tensor(picture: Image.Image) -> Tensor:
    """A decoded picture as uint8 (C, H, W)."""
    levels = torch.from_numpy(np.array(picture))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)
