"""The folder that an audit writes into: whose it is, and what is said of where all comes from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foreshot.errors import ForeshotError, printable
from foreshot.files import check_writable, read_json
from foreshot.report.page import named

VERDICT = "verdict.json"
FILES = (VERDICT, "report.html", "ranked.jsonl", "ranked.parquet", "changes.safetensors")
"""All that an audit writes."""
MARK = ".audit"
"""Stands in the folder while an audit writes into it: who is killed leaves it behind."""
COLOURS = {"clean": "bold green", "suspicious": "bold red", "none": "bold yellow"}
"""Of verdicts, in the terminal."""


def written(paths: Mapping[str, Path], date: datetime) -> dict[str, Any]:
    """What `verdict.json` says of where all comes from, and when it was looked at."""
    where = {what: str(path.resolve()) for what, path in paths.items()}
    return {"date": date.isoformat(timespec="seconds"), "paths": where}


def told(paths: Mapping[str, Path], date: datetime) -> dict[str, str]:
    """The same for people."""
    where = {what: named(str(path.resolve()), 300) for what, path in paths.items()}
    return {**where, "date": f"{date:%Y-%m-%d %H:%M} UTC", "foreshot": version("foreshot")}


@contextmanager
def taken(out: Path, source: Path, *others: Path, chosen: bool) -> Iterator[None]:
    """A folder, within, to write the report into; see `renew`."""
    renew(out, source, *others, chosen=chosen)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    try:
        yield
    except BaseException:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        raise
    finally:
        (out / MARK).unlink(missing_ok=True)


def renew(out: Path, source: Path, *others: Path, chosen: bool) -> None:
    """Takes a folder for the report: what an earlier audit has left there is gone from now on.

    Args:
        out: the folder.
        source: of what the report will be.
        others: what else is read for it.
        chosen: whether it was asked for; if not, the report of something else is not overwritten.

    Raises:
        ForeshotError: the folder is another's, or what would be gone is no audit's.
    """
    check_writable(out)
    if (out / "config.yaml").exists():
        raise ForeshotError(f"{out}: expected a folder for the report, found a run's")
    there = [out / name for name in FILES if (out / name).exists()]
    given = {path.resolve() for path in (source, *others)}
    subject = _subject(out / VERDICT)
    ours = not chosen or subject is not None or (out / MARK).exists()
    for file in there:
        if not ours or file.resolve() in given:
            why = "which is to be read" if ours else "and no audit's verdict"
            raise ForeshotError(
                f"{out}: expected a folder for the report, found {file.name} there, {why}; "
                "--out names another folder"
            )
    before = None if chosen else subject
    if before not in (None, str(source.resolve())):
        sentence = f"{out}: expected no audit or one of {source}, found one of {before}"
        raise ForeshotError(printable(f"{sentence}; --out names another folder"))
    for file in there:
        file.unlink(missing_ok=True)


def _subject(verdict: Path) -> Any:
    """Of what an audit was; None if there is none that says so."""
    try:
        return next(iter(read_json(verdict)["paths"].values()))
    except (ForeshotError, TypeError, KeyError, AttributeError, StopIteration):
        return None


def check_apart(out: Path, *sets: Path) -> None:
    """Refuses a folder for the report that lies in a set: its pictures would be of the next one."""
    for folder in sets:
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ForeshotError(
                f"{out}: expected a folder for the report outside {folder}; --out names another"
            )


def check_free(folder: Path, out: Path, *sets: Path) -> None:
    """Refuses a folder for the kept subset that is not empty, or will not be.

    Args:
        folder: what is asked for.
        out: where the report is written, which must not lie in it.
        sets: in which it must not lie: the set, and the images that are trusted.
    """
    for given in sets:
        if folder.resolve().is_relative_to(given.resolve()):
            raise ForeshotError(f"{folder}: expected a folder outside {given}, found one in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ForeshotError(f"{folder}: expected no folder or an empty one, found other files")
    check_writable(folder.resolve().parent)  # it is made beside, and put there when it is whole
    if out.resolve().is_relative_to(folder.resolve()):
        raise ForeshotError(f"{folder}: expected a folder apart from the report's, found {out}")
