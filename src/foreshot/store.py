"""Content-addressed stages: what a stage computed is found again by the hash of what went into it.

Layout of a store: `<stage>/<key>/` holds a finished stage's files and `done.json` with their
digests; `work/` holds unfinished ones, with their checkpoints; `locks/` keeps two processes from
computing the same stage at once. Everything in it may be deleted at any time.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from foreshot.errors import ForeshotError
from foreshot.files import file_digest, locked, sync_folder, write_json
from foreshot.progress import Event, Listener, silent

DONE = "done.json"
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What says that a file is not there; that it could not be read at the time is no damage."""


def home() -> Path:
    """Where foreshot keeps its store and downloads: $FORESHOT_HOME, else ~/.cache/foreshot."""
    return Path(os.environ.get("FORESHOT_HOME") or Path.home() / ".cache" / "foreshot")


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

    def __init__(self, root: Path, listener: Listener = silent) -> None:
        self.root = root
        self.listener = listener

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
        key = content_hash({"stage": stage, **inputs})
        final = self.root / stage / key
        with locked(self.root / "locks" / f"{stage}-{key}"):
            if found := self._finished(final, label or stage):
                self.listener(Event(label or stage, "note", message="found in the store"))
                return found
            work = self.root / "work" / f"{stage}-{key}"
            work.mkdir(parents=True, exist_ok=True)
            (work / DONE).unlink(missing_ok=True)  # of one that was killed before it was moved
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
            return Artefact(final, digests, seconds)

    def _finished(self, folder: Path, label: str) -> Artefact | None:
        """The artefact, if it is there and whole; a damaged one is reported and removed."""
        try:
            record = json.loads((folder / DONE).read_text(encoding="utf-8"))
            for name, digest in record["digests"].items():
                if file_digest(folder / name) != digest:
                    raise ValueError(f"{name} has changed")
            return Artefact(folder, record["digests"], record["seconds"])
        except (*MISSING, ValueError, KeyError, TypeError, AttributeError) as error:
            if folder.exists():
                message = f"{folder} is damaged ({error}); it is computed again"
                self.listener(Event(label, "note", message=message))
                shutil.rmtree(folder)
            return None


def content_hash(value: Any) -> str:
    """BLAKE2b of a JSON value, 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()


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
