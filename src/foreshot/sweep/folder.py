"""A sweep's folder: a run folder for each cell, what became of it, and the table of all of them.

`cells/NAME.json` says what was set in a cell and, if it failed, why; `NAME/` is its run folder.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foreshot.errors import ForeshotError
from foreshot.executor import Failure
from foreshot.extras import imported
from foreshot.files import read_json, write_bytes, write_json, write_parquet
from foreshot.record import REPORT
from foreshot.sweep.definition import Cell


class SweepFolder:
    """A folder of cells.

    Raises:
        ForeshotError: there is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not (path / "cells").is_dir():
            if not path.is_dir():
                raise ForeshotError(f"{path}: expected a folder for the sweep, found a file")
            if any(path.iterdir()):
                raise ForeshotError(f"{path}: expected a sweep's folder or an empty one, found one "
                                    "with other files")  # fmt: skip

    def add(self, cells: Sequence[Cell]) -> None:
        """Notes the cells that are new; those of earlier sweeps stay."""
        known = {file.stem for file in self.path.glob("cells/*.json")}
        new = [cell for cell in cells if cell.name not in known]
        for number, cell in enumerate(new, len(known)):
            write_json(self._state(cell.name), {"number": number, "settings": cell.values})

    def run(self, name: str) -> Path:
        """A cell's run folder."""
        return self.path / name

    def lock(self, name: str) -> Path:
        """What a process holds that runs a cell."""
        return self.path / "cells" / f"{name}.lock"

    def failure(self, name: str) -> str | None:
        """Why a cell failed; None if it did not."""
        file = self._state(name)
        return _noted(file).get("error") if file.exists() else None

    def note(self, name: str, failure: Failure | None) -> None:
        """Notes what became of a cell."""
        state = {key: value for key, value in _noted(self._state(name)).items()
                 if key not in ("error", "trace")}  # fmt: skip
        if failure is not None:
            state |= {"error": failure.reason, "trace": failure.trace}
        write_json(self._state(name), state)

    def rows(self) -> list[dict[str, Any]]:
        """One row a cell: what was set, what was measured, or why it failed."""
        states = {file.stem: _noted(file) for file in self.path.glob("cells/*.json")}
        return [
            self._row(name, state)
            for name, state in sorted(states.items(), key=lambda item: item[1]["number"])
        ]

    def write_results(self) -> None:
        """Writes `results.jsonl`, and `results.parquet` if there is a package for it."""
        rows = self.rows()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_bytes(self.path / "results.jsonl", lines.encode())
        try:
            write_parquet(self.path / "results.parquet", list(_alike(rows)))
        except ForeshotError as error:
            print(f"{error}; results.jsonl holds the same.")

    def _row(self, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
        folder, error = self.run(name), state.get("error")
        row = {"cell": name, "state": "open" if error is None else "failed"}
        if finished(folder):
            manifest = read_json(folder / "manifest.json")
            try:
                row = {"cell": name, "state": "done", "seed": manifest["seed"]}
                row |= dict(_flat(read_json(folder / "metrics.json")))
                row |= {
                    "digest": manifest["outputs"]["student.safetensors"],
                    "commit": manifest["source"].get("commit"),
                    **{key: manifest[key] for key in ("device", "precision", "threads")},
                }
            except (LookupError, TypeError, AttributeError):
                raise ForeshotError(
                    f"{folder}: expected the manifest and metrics of a run, found others; without "
                    "the folder the cell runs again"
                ) from None
            error = None
        return row | state["settings"] | {"path": str(folder), "error": error}

    def _state(self, name: str) -> Path:
        return self.path / "cells" / f"{name}.json"


def results(folder: str | Path) -> Any:
    """What the cells of a sweep measured, as a pandas DataFrame: one row a cell.

    Columns are the keys that were set and the keys of `metrics.json` with dots between them, such
    as `student.asr.value`, `.low` and `.high`; rates of single classes are left out. Beside them
    stand `cell`, `state` (done, failed or open), `seed`, `digest` (SHA-256 of the student),
    `commit`, `device`, `precision`, `threads`, `path` and `error`.

    Args:
        folder: of the sweep.

    Raises:
        ForeshotError: it is no sweep's folder, or there is no pandas.
    """
    pandas = imported("pandas", "pandas", "results")
    path = Path(folder)
    if not (path / "cells").is_dir():
        raise ForeshotError(f"{path}: expected a sweep's folder, found none")
    return pandas.DataFrame(SweepFolder(path).rows())


def finished(folder: Path) -> bool:
    """Whether a run has been measured."""
    return (folder / "metrics.json").exists() and (folder / "manifest.json").exists()


def complete(folder: Path) -> bool:
    """Whether a run folder is complete: the page is written last."""
    return finished(folder) and (folder / REPORT).exists()


def _noted(file: Path) -> dict[str, Any]:
    """What is noted of a cell."""
    state = read_json(file)
    known = isinstance(state, dict) and isinstance(state.get("settings"), dict)
    if not known or not isinstance(state.get("number"), int):
        raise ForeshotError(
            f"{file}: expected the number and settings of a cell, found others; without the file "
            "it is noted again"
        )
    return state


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The single values of a tree, by dotted key."""
    for key, node in tree.items():
        if isinstance(node, Mapping):
            if key != "per_class":
                yield from _flat(node, f"{prefix}{key}.")
        elif not isinstance(node, list):
            yield prefix + key, node


def _alike(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows with all columns in each, and one type in each column, as a table needs it."""
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    mixed = set()
    for key in columns:
        kinds = {type(row[key]) for row in rows if row.get(key) is not None}
        if len(kinds) > 1 and kinds != {int, float}:
            mixed.add(key)
    for row in rows:
        yield {key: str(row[key]) if key in mixed and row.get(key) is not None else row.get(key)
               for key in columns}  # fmt: skip
