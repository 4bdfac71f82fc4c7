"""A folder behind a URL, where machines that share no disk leave each other what they computed.

Layout: `URL/<stage>/<key>/<file>`, as in a store. Any file system of fsspec will do; those that are
not in fsspec itself are packages, such as s3fs, which the user installs.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from foreshot.errors import ForeshotError, brief, printable
from foreshot.extras import imported
from foreshot.files import replacing

VARIABLE = "FORESHOT_REMOTE"
SIGN = "foreshot.txt"
"""A file that every remote holds: that it was written and read shows that both can be done."""
BLOCK = 2**20


class LostError(Exception):
    """The remote did not answer, or refused."""


@dataclass(frozen=True)
class Remote:
    """A file system and a folder in it.

    Args:
        system: of fsspec.
        root: path of the folder.
        name: its URL, without a password.
    """

    system: Any
    root: str
    name: str

    def has(self, file: Path) -> bool:
        """Whether a file is there; files are named as they are in a store.

        Raises:
            LostError: that cannot be told.
        """
        try:
            with _asking(FileNotFoundError):
                self.system.info(self._path(file))
        except FileNotFoundError:
            return False
        return True

    def fetch(self, file: Path, folder: Path, limit: int) -> int:
        """Copies a file into a local folder; returns its size in bytes.

        Args:
            file: which.
            folder: where it goes.
            limit: most bytes.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is larger than `limit`.
            LostError: it could not be read.
        """
        size = 0
        with replacing(folder / file.name) as part, part.open("wb") as copy:
            for block in self._blocks(file):
                size += len(block)
                if size > limit:
                    raise ValueError(f"{file.name}: expected {limit} bytes or fewer, found more")
                copy.write(block)
        return size

    def give(self, files: Iterable[Path]) -> None:
        """Copies local files there, one after the other, over those that are there.

        Raises:
            LostError: one could not be written, or the remote is another one than at the start.
        """
        if not self.has(Path(SIGN)):  # the empty folder that is left where a share was mounted
            raise LostError(f"{SIGN} is gone")
        with _asking():
            for file in files:
                path = self._path(file)
                self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.system.put_file(str(file), path)

    def remove(self, file: Path) -> None:
        """Removes a file.

        Raises:
            LostError: it could not be removed.
        """
        with suppress(FileNotFoundError), _asking(FileNotFoundError):
            self.system.rm_file(self._path(file))

    def _path(self, file: Path) -> str:
        return "/".join((self.root, *file.parts[-3:]))

    def _blocks(self, file: Path) -> Iterator[bytes]:
        with _asking(FileNotFoundError), self.system.open(self._path(file), "rb") as stream:
            while block := stream.read(BLOCK):
                yield block


@cache
def reached(url: str) -> Remote:
    """What a URL stands for, once it was written to and read from.

    A process that has reached it once does not do so again: one that goes later ends no sweep.

    Raises:
        ForeshotError: it cannot be reached, written or read, or there is no package for it.
    """
    name = re.sub(r"//[^/@]*@", "//", url)
    try:
        if "://" not in url:
            raise ValueError("no protocol")
        system, root = imported("fsspec.core", "remote", VARIABLE).url_to_fs(url)
        remote = Remote(system, root.rstrip("/"), name.rstrip("/"))
        sign = f"{remote.root}/{SIGN}"
        system.pipe_file(sign, b"What lies beside this file was computed by foreshot.\n")
        system.cat_file(sign)
    except ForeshotError:
        raise
    except Exception as error:  # packages raise anything
        raise ForeshotError(
            f"{VARIABLE}: expected the URL of a folder that can be read and written, such as "
            f"s3://bucket/prefix, found {name} ({printable(brief(error))})"
        ) from None
    return remote


@contextmanager
def _asking(*expected: type[Exception]) -> Iterator[None]:
    """Whatever a package raises, but what is expected, is one error."""
    try:
        yield
    except expected:
        raise
    except Exception as error:
        raise LostError(printable(brief(error))) from error
