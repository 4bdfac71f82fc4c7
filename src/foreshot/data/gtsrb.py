"""The German Traffic Sign Recognition Benchmark."""

import csv
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from foreshot.data.base import Dataset, ImageSet, Splits
from foreshot.data.files import check_digest, fetch, read_at_most, read_picture
from foreshot.errors import ForeshotError

URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
LARGEST = 1 << 22
"""Bytes of one file in the archives; the largest picture is 250 x 250."""
CLASSES = (
    *(f"speed limit {kmh} km/h" for kmh in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80 km/h",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no passing",
    "no passing for vehicles over 3.5 t",
    "right of way at the next intersection",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "vehicles over 3.5 t prohibited",
    "no entry",
    "general caution",
    "dangerous curve to the left",
    "dangerous curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road work",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice or snow",
    "wild animals crossing",
    "end of all speed and passing limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "go straight or right",
    "go straight or left",
    "keep right",
    "keep left",
    "roundabout mandatory",
    "end of no passing",
    "end of no passing for vehicles over 3.5 t",
)


class Sign(NamedTuple):
    """One row of an annotation file: a picture, the box of the sign in it, and its class."""

    file: str
    box: tuple[int, int, int, int]
    label: int


class Gtsrb(Dataset):
    """GTSRB: 39,209 + 12,630 photographs of German traffic signs, 43 classes.

    Stallkamp, Schlipsing, Salmen, Igel, "Man vs. computer: Benchmarking machine learning algorithms
    for traffic sign recognition", Neural Networks 32, 2012. Each picture is cropped to the box of
    its sign and resized. Reads the official archives from ``gtsrb/`` of the cache, or downloads
    them there.

    Args:
        size: height and width of an image, in pixels.
    """

    name: Literal["gtsrb"] = "gtsrb"
    size: int = Field(default=32, ge=8, le=256)

    archives: ClassVar = {
        "GTSRB_Final_Training_Images.zip": "md5:f33fd80ac59bff73c82d25ab499e03a3",
        "GTSRB_Final_Test_Images.zip": "md5:c7e4e6327067d32654124b0fe9e82185",
        "GTSRB_Final_Test_GT.zip": "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5",
    }

    def load(self, cache: Path) -> Splits:
        paths = [
            fetch(URL + file, digest, cache / self.name / file)
            for file, digest in self.archives.items()
        ]
        for path, digest in zip(paths, self.archives.values(), strict=True):
            check_digest(path, digest, str(path))
        train, test, truth = map(Zip, paths)
        folders = [f"GTSRB/Final_Training/Images/{label:05d}/" for label in range(len(CLASSES))]
        annotations = [f"{folder}GT-{label:05d}.csv" for label, folder in enumerate(folders)]
        trained = [
            sign
            for folder, annotation in zip(folders, annotations, strict=True)
            for sign in train.signs(annotation, folder)
        ]
        tested = list(truth.signs("GT-final_test.csv", "GTSRB/Final_Test/Images/"))
        return Splits(train.images(trained, self.size), test.images(tested, self.size))


class Zip:
    """One of the archives, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, files: list[str]) -> Iterator[bytes]:
        """The contents of members of the archive, in that order."""
        broken = (
            *(KeyError, OSError, EOFError, RuntimeError, ValueError),  # a name is no UTF-8, say
            *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
        )
        try:
            with zipfile.ZipFile(self.path) as archive:
                for file in files:
                    with archive.open(file) as stream:
                        content = read_at_most(stream, LARGEST, f"{self.path}: {file}")
                    yield content
        except broken as error:
            raise ForeshotError(f"{self.path}: expected a whole archive, found {error}") from error

    def signs(self, annotation: str, folder: str) -> Iterator[Sign]:
        """The rows of an annotation file; pictures are named from the root of the archive."""
        (content,) = self.read([annotation])
        rows = csv.DictReader(io.StringIO(content.decode(errors="replace")), delimiter=";")
        try:
            for row in rows:
                left, top, right, bottom = (int(row[f"Roi.{c}"]) for c in ("X1", "Y1", "X2", "Y2"))
                yield Sign(
                    folder + row["Filename"], (left, top, right, bottom), int(row["ClassId"])
                )
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            where = f"{self.path}: {annotation}, line {rows.line_num}"
            raise ForeshotError(f"{where}: expected a row of annotation, found {error}") from error

    def images(self, signs: list[Sign], size: int) -> ImageSet:
        """Each sign cut out of its picture; X2 and Y2 are the first column and row beyond it."""
        pixels = np.empty((len(signs), size, size, 3), np.uint8)
        for slot, sign, content in zip(
            pixels, signs, self.read([sign.file for sign in signs]), strict=True
        ):
            what = f"{self.path}: {sign.file}"
            picture = read_picture(content, ("PPM",), what).convert("RGB")
            left, top, right, bottom = sign.box
            if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
                raise ForeshotError(
                    f"{what}: expected a box inside {picture.size}, found {sign.box}"
                )
            # Not resize(box=...), whose filter would reach over the edge of the box.
            cut = picture.crop(sign.box).resize((size, size), Image.Resampling.BILINEAR)
            slot[:] = np.asarray(cut)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor([sign.label for sign in signs]), CLASSES)
