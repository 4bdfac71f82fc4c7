"""Pictures of a folder or a file as one set: what cannot be read is named, and left out."""

import os
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import torch

from foreshot.data.base import ImageSet
from foreshot.data.files import LARGEST_PICTURE, read_file
from foreshot.data.folder import SUFFIXES, decoded, tensor
from foreshot.data.mapped import room
from foreshot.data.tensor import read
from foreshot.errors import ForeshotError, nearest, printable
from foreshot.progress import Event, Listener, silent

LEFT_OUT = "left-out.jsonl"
"""What an audit writes beside the pictures that it keeps: of the next one's set it is no part."""
OFTEN = 64
"""Pictures between two reports of progress."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was read.

    Args:
        images: the set; its classes are the teacher's.
        names: of its images: paths within the folder, or numbers.
        digests: of the files, SHA-256; empty where the set is one file.
        skipped: what was not read, and why, by path within the folder.
    """

    images: ImageSet
    names: list[str]
    skipped: dict[str, str]
    digests: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """How pictures are to be read.

    Args:
        shape: (C, H, W), which the teacher takes; pictures are cropped and resized to it.
        classes: the teacher's.
        labels: whether labels are read: a picture's is the first folder on the way to it.
        refuse: whether a file that cannot be read is an error, and not passed over.
        cache: folder for images that memory does not hold.
        listener: hears of the progress.
        stage: what it hears that this is.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    labels: bool = False
    refuse: bool = False
    cache: Path = Path()
    listener: Listener = silent
    stage: str = "read"


def read_set(path: Path, wanted: Wanted) -> Found:
    """The pictures in a folder, at any depth, or the images of a safetensors file.

    Raises:
        ForeshotError: there are none, they are not what is wanted, or one cannot be read where
            `wanted.refuse` says so.
    """
    if not path.exists():
        raise ForeshotError(
            f"{path}: expected a folder of pictures or a safetensors file, found nothing"
        )
    found = _folder(path, wanted) if path.is_dir() else _file(path, wanted)
    if wanted.labels and found.images.labels is None:
        raise ForeshotError(f"{path}: expected labels, found none")
    return found if wanted.labels else replace(found, images=replace(found.images, labels=None))


def _file(path: Path, wanted: Wanted) -> Found:
    images, labels, classes = read(path)
    shape = tuple(images.shape[1:])
    if shape != wanted.shape:
        raise ForeshotError(
            f"{path}: expected images of the teacher's shape {wanted.shape}, found {shape}"
        )
    if wanted.labels and classes not in ((), wanted.classes):
        raise ForeshotError(
            f"{path}: expected the teacher's classes {printable(str(wanted.classes))}, "
            f"found {printable(str(classes))}"
        )
    kept = ImageSet(images, labels if wanted.labels else None, wanted.classes)
    return Found(kept, [str(index) for index in range(len(images))], {})


def _folder(root: Path, wanted: Wanted) -> Found:
    channels, height, width = wanted.shape
    if height != width:
        raise ForeshotError(
            f"{root}: expected a teacher of square images, to which pictures are cropped, "
            f"found one of {height} x {width}"
        )
    if channels not in (1, 3):
        raise ForeshotError(
            f"{root}: expected a teacher of images of 1 or 3 channels, found one of {channels}"
        )
    files = _files(root)
    images, again = room((len(files), *wanted.shape), wanted.cache)
    names, labels, digests, skipped = [], [], [], {}
    tell = wanted.listener
    tell(Event(wanted.stage, "start", total=len(files)))
    for done, path in enumerate(files, 1):
        name = str(path.relative_to(root))
        try:
            label = _label(path, root, wanted) if wanted.labels else 0
            content = content_of(path, root)
            picture = decoded(content, channels, height, str(path))
            images[len(names)] = tensor(picture)
            names.append(name)
            labels.append(label)
            digests.append(sha256(content).digest())
        except ForeshotError as error:
            if wanted.refuse:
                raise ForeshotError(printable(str(error))) from error
            skipped[name] = str(error).removeprefix(f"{path}: ")
        if done % OFTEN == 0 or done == len(files):
            tell(Event(wanted.stage, "advance", done, len(files)))
    tell(Event(wanted.stage, "end", values={"read": len(names), "skipped": len(skipped)}))
    if not names:
        what = "no file"
        if skipped:
            name, why = next(iter(skipped.items()))
            what = f"none that can be read of {len(skipped):,}, the first being {name}: {why}"
        raise ForeshotError(
            printable(f"{root}: expected pictures ({', '.join(SUFFIXES)}), found {what}")
        )
    remap = again and (lambda: again()[: len(names)])
    kept = ImageSet(images[: len(names)], torch.tensor(labels), wanted.classes, remap)
    return Found(kept, names, skipped, digests)


def _files(root: Path) -> list[Path]:
    """What lies in a folder and is not hidden, sorted; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise ForeshotError(printable(f"{error.filename}: expected a readable folder, {error}"))

    found = []
    for folder, inner, files in os.walk(root, onerror=refuse):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        links = [name for name in inner if (Path(folder) / name).is_symlink()]
        found += [Path(folder) / name for name in (*files, *links) if not name.startswith(".")]
    return sorted(path for path in found if path != root / LEFT_OUT)


def content_of(path: Path, root: Path) -> bytes:
    """What a picture's file holds; it has to be a regular one, and may not lead out of `root`."""
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ForeshotError(f"{path}: expected to stay in {root}, found a link that leads out")
    except (OSError, RuntimeError) as error:  # a RuntimeError is a loop of links
        raise ForeshotError(f"{path}: expected a readable file, found {error}") from error
    if path.is_dir():
        raise ForeshotError(f"{path}: expected a picture, found a link to a folder, not followed")
    if path.suffix.lower() not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise ForeshotError(f"{path}: expected a picture ({kinds}), found another kind of file")
    if not path.is_file():  # a pipe would be waited for
        raise ForeshotError(f"{path}: expected a regular file, found something else")
    return read_file(path, LARGEST_PICTURE)


def _label(path: Path, root: Path, wanted: Wanted) -> int:
    name = path.relative_to(root).parts[0]
    if name not in wanted.classes:
        hint = nearest(name, wanted.classes)
        raise ForeshotError(f"{path}: expected a folder named as a class of the teacher; {hint}")
    return wanted.classes.index(name)
