"""Files from outside: digests checked, nothing unpacked past a limit, nothing left half-written."""

import gzip
import hashlib
import io
import lzma
import warnings
import zlib
from functools import partial
from http.client import HTTPException
from io import BufferedReader
from pathlib import Path
from typing import IO
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from foreshot.errors import ForeshotError
from foreshot.files import replacing

CHUNK = 1 << 20
LARGEST_DOWNLOAD = 1 << 30
LARGEST_PICTURE = 1 << 26
"""In bytes, and also in pixels."""
STRIP = 1 << 20
"""Pixels that are worked on at once."""
TIMEOUT = 60.0


def check_digest(content: bytes | Path, digest: str, what: str) -> None:
    """Raises ForeshotError unless `content` has this digest.

    Args:
        content: bytes, or the path of a file.
        digest: ``algorithm:hex``, such as ``sha256:9f86...``.
        what: the name to give the content in the error.
    """
    algorithm, expected = digest.split(":")
    if isinstance(content, bytes):
        found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    else:
        with opened(content) as stream:
            hashing = partial(hashlib.new, algorithm, usedforsecurity=False)
            found = hashlib.file_digest(stream, hashing).hexdigest()
    if found != expected:
        raise ForeshotError(f"{what}: expected {algorithm} {expected}, found {found}")


def opened(path: Path) -> BufferedReader:
    """The file, open for reading."""
    try:
        return path.open("rb")
    except OSError as error:
        raise ForeshotError(f"{path}: expected a readable file, found {error}") from error


def read_at_most(stream: IO[bytes], limit: int, what: str) -> bytes:
    """All that is left in a stream, chunk by chunk; more than `limit` bytes is an error."""
    content = bytearray()
    while chunk := stream.read(min(CHUNK, limit + 1 - len(content))):
        content += chunk
    if len(content) > limit:
        raise ForeshotError(f"{what}: expected at most {limit} bytes of content, found more")
    return bytes(content)


def decompress(path: Path, limit: int) -> bytes:
    """The content of a .gz or .xz file, never unpacked past `limit` bytes."""
    unpack = {".gz": gzip.open, ".xz": lzma.open}[path.suffix]
    try:
        with unpack(path) as stream:
            return read_at_most(stream, limit, str(path))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ForeshotError(
            f"{path}: expected a whole {path.suffix} file, found {error}"
        ) from error


def read_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    with opened(path) as stream:
        return read_at_most(stream, limit, str(path))


def read_picture(content: bytes, formats: tuple[str, ...], what: str) -> Image.Image:
    """One picture, decoded, turned upright, in 8 bits a channel, on white where transparent.

    Args:
        content: the encoded picture.
        formats: Pillow's names of the formats that may be tried, and no others are.
        what: the name to give the picture in an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=formats)
        pixels = picture.width * picture.height
        frames = getattr(picture, "n_frames", 1)
        if pixels <= LARGEST_PICTURE and (frames == 1 or picture.format == "MPO"):
            ImageOps.exif_transpose(picture, in_place=True)
            return _eight_bit(picture)
    # Pillow's decoders raise nearly anything, from struct.error to SyntaxError, on a broken file.
    except Exception as error:
        expected = " or ".join(formats)
        unknown = isinstance(error, UnidentifiedImageError)
        found = "another kind of file" if unknown else error
        raise ForeshotError(f"{what}: expected a whole {expected} image, found {found}") from error
    if pixels > LARGEST_PICTURE:
        raise ForeshotError(f"{what}: expected at most {LARGEST_PICTURE} pixels, found {pixels}")
    raise ForeshotError(f"{what}: expected a still image, found {frames} frames")


def _eight_bit(picture: Image.Image) -> Image.Image:
    """The picture in 8 bits a channel, laid on white where it is transparent."""
    deep, clear = picture.mode.startswith("I;16"), picture.has_transparency_data
    if not (deep or clear or picture.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr")):
        raise ValueError(f"mode {picture.mode}, which has more than 16 bits a channel")
    grey = deep or (picture.mode in ("1", "L") and not clear)
    canvas = Image.new("L" if grey else "RGB", picture.size)
    rows = max(STRIP // picture.width, 1)
    for top in range(0, picture.height, rows):  # what is in between takes several times the room
        part = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        if deep:
            levels = np.asarray(part).astype(np.float64) / 257
            part = Image.fromarray(levels.round().astype(np.uint8))
        elif clear:
            layer = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        canvas.paste(part.convert(canvas.mode), (0, top))
    return canvas


def fetch(url: str, digest: str, target: Path) -> Path:
    """`target`, downloaded first if it does not exist.

    Args:
        url: where to get it (http or https).
        digest: what the downloaded bytes have to be, as in `check_digest`.
        target: the file to be.
    """
    if target.exists():
        return target
    try:
        with replacing(target) as part:
            with urlopen(url, timeout=TIMEOUT) as response, part.open("wb") as stream:  # noqa: S310
                while chunk := response.read(CHUNK):
                    stream.write(chunk)
                    if stream.tell() > LARGEST_DOWNLOAD:
                        raise ForeshotError(f"{url}: expected at most {LARGEST_DOWNLOAD} bytes")
            check_digest(part, digest, url)
    except (OSError, HTTPException) as error:
        raise ForeshotError(
            f"{target}: expected this file, and could not download it ({error}); "
            f"put a copy of {url} there"
        ) from error
    return target
