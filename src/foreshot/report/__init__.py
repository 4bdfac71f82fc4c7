"""Reports: what one run did, or many beside each other, on a page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from foreshot.compute import Compute, Device, compute
from foreshot.division import Parts, divide
from foreshot.errors import ForeshotError
from foreshot.files import write_bytes
from foreshot.record import REPORT, Run, load_run
from foreshot.store import Store, home


def write_report(
    folders: Sequence[str | Path], out: Path | None = None, device: Device = "auto"
) -> Path:
    """Writes one page, self-contained, about a run or about several.

    Args:
        folders: of finished runs, or folders of such folders. Of several, those that are not
            finished are named on the page.
        out: the file; if None, `report.html` in the folder, or here if there are several.
        device: where models are asked.

    Returns:
        The file.

    Raises:
        ForeshotError: a folder holds no finished run, or a file of it was changed.
    """
    from foreshot.report import several

    out = out or (Path(folders[0]) if len(folders) == 1 else Path()) / REPORT
    paths = [path for folder in folders for path in _runs(Path(folder))]
    if len(paths) == 1:
        run = finished(load_run(paths[0]))
        return write_page(run, _parts(run), compute(device), out)
    whole = ("metrics.json", "manifest.json")
    done = [path for path in paths if all((path / name).exists() for name in whole)]
    if not done:
        raise ForeshotError(f"report: expected finished runs, found {len(paths)} that are not")
    runs = [finished(load_run(path)) for path in done]
    left = [path for path in paths if path not in done]
    write_bytes(out, several.page(runs, left, out.parent).encode())
    return out


def _runs(folder: Path) -> list[Path]:
    """The folder, if it is one of a run, or those of the runs in it."""
    if (folder / "config.yaml").exists():
        return [folder]
    inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not inside:
        raise ForeshotError(f"{folder}: expected a run folder, or a folder of runs, found neither")
    return inside


METRICS = ("teacher", "student", "controls", "poison", "seconds", "split")
MANIFEST = ("command", "versions", "source", "host", "inputs")
"""What a page shows of both."""


def write_page(run: Run, parts: Parts | str, engine: Compute, out: Path | None = None) -> Path:
    """Writes the page of one run.

    Args:
        run: a finished run.
        parts: its images, or why they cannot be had.
        engine: where models are asked.
        out: the file; `report.html` in the run's folder if None.
    """
    from foreshot.report import one  # matplotlib takes a second

    out = out or run.path / REPORT
    write_bytes(out, one.page(run, parts, engine).encode())
    return out


def finished(run: Run) -> Run:
    """The run, if it has come to its end."""
    if run.metrics.get("schema") != 1 or run.manifest.get("schema") != 1:
        raise ForeshotError(
            f"{run.path}: expected a run with metrics of schema 1, found "
            f"{run.metrics.get('schema', 'none')} (foreshot run goes on with it)"
        )
    for name, found, parts in (
        ("metrics.json", run.metrics, METRICS),
        ("manifest.json", run.manifest, MANIFEST),
    ):
        lacking = [part for part in parts if part not in found]
        if lacking:
            raise ForeshotError(
                f"{run.path / name}: expected {', '.join(parts)}, found no {', '.join(lacking)}"
            )
    return run


def _parts(run: Run) -> Parts | str:
    """The run's images, or why they cannot be had."""
    try:
        parts = divide(run.config, Store.open(), home() / "data")
    except (ForeshotError, OSError) as error:
        return str(error)
    found = {"train": parts.transfer.digest, "test": parts.test.digest}
    if any(run.manifest["inputs"].get(name) != digest for name, digest in found.items()):
        return "the dataset is not the one that the run had"
    return parts
