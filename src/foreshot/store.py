"""Content-addressed stages: what a stage computed is found again by the hash of what went into it.

Layout of a store: `<stage>/<key>/` holds a finished stage's files and `done.json` with their
digests; `work/` holds unfinished ones, with their checkpoints; `locks/` keeps two processes from
computing the same stage at once. Everything in it may be deleted at any time. A store may have a
remote: what is missing is fetched from there, checked and kept, and what is there is given to it.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from foreshot.errors import ForeshotError, brief, printable
from foreshot.files import file_digest, locked, sync_folder, write_json
from foreshot.progress import Event, Listener, silent
from foreshot.remote import VARIABLE, LostError, Remote, reached
from foreshot.together import agree, rank

T = TypeVar("T")
LIBRARIES = ("pillow", "kornia", "scikit-learn")
"""What results depend on, beside torch and the packages that build networks."""
DONE = "done.json"
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What says that a file is not there; that it could not be read at the time is no damage."""
DAMAGE = (
    *MISSING,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What reading a marker raises that is not what was written."""
PLAIN = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
"""Names of files that a marker may list: none leads out of its folder."""
MARKER = 2**20
LARGEST = 2**34
"""Most bytes of a marker, and of the files of an artefact together, that are fetched."""


def home() -> Path:
    """Where foreshot keeps its store and downloads: $FORESHOT_HOME, else ~/.cache/foreshot."""
    return Path(os.environ.get("FORESHOT_HOME") or Path.home() / ".cache" / "foreshot")


def remote_url() -> str:
    """What the store shares with other machines: $FORESHOT_REMOTE, else nothing."""
    return os.environ.get(VARIABLE, "")


@dataclass(frozen=True)
class Artefact:
    """The finished files of a stage.

    Args:
        folder: where they are.
        digests: SHA-256 of each file, by name.
        seconds: how long computing them took, when they were computed.
    """

    folder: Path
    digests: Mapping[str, str]
    seconds: float

    @property
    def digest(self) -> str:
        """One digest for all files: what a later stage takes as its input."""
        return content_hash(dict(self.digests))


class Store:
    """A folder of finished stages, shared by all runs of a user and by concurrent processes."""

    def __init__(
        self, root: Path, listener: Listener = silent, remote: Remote | None = None
    ) -> None:
        self.root = root
        self.listener = listener
        self.remote = remote

    @classmethod
    def open(cls, listener: Listener = silent, root: Path | None = None) -> "Store":
        """The store that the user's environment names.

        Args:
            listener: hears of what is found and what is damaged.
            root: where it is; `$FORESHOT_HOME/store` if None.

        Raises:
            ForeshotError: there is a remote, and it cannot be reached.
        """
        url = "" if rank() else remote_url()
        return cls(root or home() / "store", listener, reached(url) if url else None)

    def stage(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        compute: Callable[[Path], None],
        label: str | None = None,
    ) -> Artefact:
        """The stage's files; computed only if they are not there, whole and unchanged.

        Args:
            stage: the name of the stage.
            inputs: everything that the result depends on, as JSON values.
            compute: writes the result into the folder that it is given. The folder may hold
                checkpoints (names that begin with a dot) of a computation that was killed.
            label: what the listener calls it, if not `stage`.
        """
        if rank():
            return _along(compute)
        key = content_hash({"stage": stage, **inputs})
        final, label = self.root / stage / key, label or stage
        with locked(self.root / "locks" / f"{stage}-{key}"):
            if found := self._finished(final, label):
                self._note(label, "found in the store")
                self._share(found, label)
                return agree(found)
            if found := self._remotely(label, lambda remote: self._fetched(remote, final, label)):
                return agree(found)
            work = self.root / "work" / f"{stage}-{key}"
            work.mkdir(parents=True, exist_ok=True)
            (work / DONE).unlink(missing_ok=True)  # of one that was killed before it was moved
            agree(work)
            began = time.perf_counter()
            compute(work)
            for leftover in work.glob(".*"):
                leftover.unlink()
            digests = {path.name: file_digest(path) for path in sorted(work.iterdir())}
            seconds = round(time.perf_counter() - began, 3)
            record = {"inputs": dict(inputs), "digests": digests, "seconds": seconds}
            write_json(work / DONE, record)
            final.parent.mkdir(parents=True, exist_ok=True)
            work.replace(final)
            sync_folder(final.parent)
            found = Artefact(final, digests, seconds)
            self._share(found, label)
            return agree(found)

    def _finished(self, folder: Path, label: str) -> Artefact | None:
        """The artefact, if it is there and whole; a damaged one is reported and removed."""
        try:
            return _whole(folder)
        except DAMAGE as error:
            if folder.exists():
                self._note(label, f"{folder} is damaged ({error}); it is computed again")
                shutil.rmtree(folder)
            return None

    def _fetched(self, remote: Remote, final: Path, label: str) -> Artefact | None:
        """The remote's artefact, moved in; a damaged one is reported and loses its marker."""
        marker, work = final / DONE, self.root / "work" / f"{final.parent.name}-{final.name}"
        if not remote.has(marker):
            return None
        arriving = work.with_name(f"{work.name}.arriving")
        shutil.rmtree(arriving, ignore_errors=True)  # of one that was killed
        arriving.mkdir(parents=True)
        try:
            remote.fetch(marker, arriving, MARKER)
            room = LARGEST
            for name in _record(arriving)["digests"]:
                room -= remote.fetch(final / name, arriving, room)
            found = replace(_whole(arriving), folder=final)
        except DAMAGE as error:
            place = f"{remote.name}/{final.parent.name}/{final.name}"
            why = printable(brief(error))
            self._note(label, f"{place} is damaged ({why}); it is computed again")
            remote.remove(marker)
            return None
        else:
            final.parent.mkdir(parents=True, exist_ok=True)
            arriving.replace(final)
            sync_folder(final.parent)
            shutil.rmtree(work, ignore_errors=True)  # checkpoints, of one that was killed
            self._note(label, f"found in {remote.name}")
            return found
        finally:
            shutil.rmtree(arriving, ignore_errors=True)

    def _share(self, artefact: Artefact, label: str) -> None:
        """Gives an artefact to the remote, if it is not there; the marker comes last."""
        *_, marker = files = [artefact.folder / name for name in (*artefact.digests, DONE)]
        if self.remote and sum(file.stat().st_size for file in files) > LARGEST:
            self._note(label, f"it is too large for {self.remote.name}, and stays here")
            return
        self._remotely(label, lambda remote: remote.has(marker) or remote.give(files))

    def _remotely(self, label: str, work: Callable[[Remote], T]) -> T | None:
        """What comes of work with the remote; once it is lost, this store goes on without it."""
        if self.remote is None:
            return None
        try:
            return work(self.remote)
        except LostError as error:
            self._note(label, f"{self.remote.name} is lost ({error}); the run goes on without it")
            self.remote = None
            return None

    def _note(self, label: str, message: str) -> None:
        self.listener(Event(label, "note", message=message))


def _record(folder: Path) -> dict[str, Any]:
    """What an artefact's marker says, if the files that it lists can be its own."""
    record = json.loads((folder / DONE).read_text(encoding="utf-8"))
    for name in record["digests"]:
        if name == DONE or not PLAIN.fullmatch(name):
            raise ValueError(f"expected a plain file name, found {name[:100]!r}")
    return record


def _whole(folder: Path) -> Artefact:
    """The artefact in a folder; raises one of `DAMAGE` if it is not what was written."""
    record = _record(folder)
    for name, digest in record["digests"].items():
        if file_digest(folder / name) != digest:
            raise ValueError(f"{name} has changed")
    return Artefact(folder, record["digests"], float(record["seconds"]))


def _along(compute: Callable[[Path], None]) -> Artefact:
    """What the first process finds, or computes; then this one computes along, for nothing."""
    said: Any = agree(None)
    if isinstance(said, Path):
        with TemporaryDirectory() as scratch:
            for checkpoint in said.glob(".*"):
                with suppress(FileNotFoundError):  # the first process threw it away
                    shutil.copy(checkpoint, scratch)
            compute(Path(scratch))
        said = agree(None)
    assert isinstance(said, Artefact)
    return said


def content_hash(value: Any) -> str:
    """BLAKE2b of a JSON value, 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are there, and of `LIBRARIES`."""
    found = {}
    for package in (*LIBRARIES, *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def source_digest(*names: str) -> str:
    """Hash of parts of foreshot's own source: a stage that runs other code is another stage.

    Args:
        names: modules and packages, as paths below the package.

    Raises:
        ForeshotError: there is no such part.
    """
    root = Path(__file__).parent
    digests = {}
    for name in names:
        part = root / name
        files = sorted(part.rglob("*.py")) if part.is_dir() else [part]
        if not all(file.exists() for file in files):
            raise ForeshotError(f"{part}: expected a part of foreshot's source, found nothing")
        digests |= {str(file.relative_to(root)): file_digest(file) for file in files}
    return content_hash(digests)
