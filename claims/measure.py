"""Measures a claim: one experiment with several seeds, each run as a user runs it; one JSON.

    python claims/measure.py signs --out claims/signs.json
    python claims/measure.py signs --seeds 0 1 2 3 --set attack.rate=0.01 --out claims/signs-1.json

Each seed is a `foreshot run` in a process of its own with an empty store, so wall time and peak
memory are a user's. A seed that fails stays in the file, as a failure. The file is written after
each seed: the same command goes on where it was interrupted, if nothing has changed since. It
never runs a seed of the file again; for that, delete the file.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from foreshot.compute import compute
from foreshot.config import load_config
from foreshot.errors import ForeshotError
from foreshot.executor import Failure
from foreshot.files import read_json, write_json
from foreshot.record import environment
from foreshot.store import home
from foreshot.workers import Workers

T = TypeVar("T")


def measure(
    preset: str, seeds: list[int], settings: list[str], out: Path, runs: Path, device: str
) -> dict[str, Any]:
    """Runs the seeds that `out` does not hold yet; returns what it holds then."""
    config = load_config(preset, settings)
    options = [part for setting in settings for part in ("--set", setting)]
    command = ["foreshot", "run", preset, *options]
    same: dict[str, Any] = {
        "schema": 1,
        "command": shlex.join(command + ([] if device == "auto" else ["--device", device])),
        "config": config.model_dump(mode="json", exclude={"seed"}),
        **compute(device, config.precision).describe(),  # pyright: ignore[reportArgumentType]
        **environment(),
    }
    rows = {row["seed"]: row for row in kept(out, same)}
    claim: dict[str, Any] = {}
    for seed in seeds:
        if seed not in rows:
            rows[seed] = _run(preset, options, seed, device, runs / f"seed-{seed}")
        row = rows[seed]
        result = f"ASR {row['metrics']['student']['asr']['value']:.1%}" if row["ok"] else "FAILED"
        print(f"seed {seed}: {result}, {row['wall_seconds']} s, {row['peak_memory_mib']} MiB")
        claim = same | {
            "date": datetime.now(UTC).date().isoformat(),
            "seeds": list(rows),
            "failed": [seed for seed, row in rows.items() if not row["ok"]],
            "summary": summary([row for row in rows.values() if row["ok"]]),
            "runs": list(rows.values()),
        }
        write_json(out, claim)
    return claim


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Mean, sample standard deviation, minimum and maximum of each figure over the runs."""
    figures: dict[str, list[float]] = {}
    for row in rows:
        for name, value in _numbers(row).items():
            figures.setdefault(name, []).append(value)
    return {
        name: {
            "mean": mean(values),
            "std": stdev(values) if len(values) > 1 else None,
            "min": min(values),
            "max": max(values),
            "n": len(values),
        }
        for name, values in figures.items()
        if name not in ("seed", "metrics.schema")
    }


def _numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The figures of a tree by dotted path; a rate (with its hits and interval) is one figure."""
    found: dict[str, float] = {}
    for key, node in tree.items():
        value = node.get("value", node) if isinstance(node, dict) else node
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def kept(out: Path, same: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that are in `out` already, if they are runs of the same thing.

    Args:
        out: what was written before.
        same: what it has to say, key by key.
    """
    # Of a changed source nobody knows whether it is the same change.
    if not out.exists() or ("source" in same and same["source"].get("dirty", True)):
        return []
    before = read_json(out)
    return before["runs"] if all(before.get(k) == v for k, v in same.items()) else []


def outcomes(
    work: Callable[[T], dict[str, Any]], jobs: list[T], workers: int, title: Callable[[T], str]
) -> Iterator[tuple[T, dict[str, Any]]]:
    """Jobs and what was measured of each, as they end; of one that failed, why.

    Args:
        work: measures one job.
        jobs: in the order in which they are to be started.
        workers: processes; 1 is this one.
        title: what a job is called, in what is printed.

    Raises:
        ForeshotError: a job came to nothing for a reason that is not its own.
    """
    executor = Workers(workers=workers).executor

    def started(number: int) -> None:
        print(f"{title(jobs[number])}: begins", flush=True)

    with closing(executor.map(partial(tried, work), jobs, started)) as ended:
        for count, (number, row) in enumerate(ended, 1):
            name = title(jobs[number])
            if isinstance(row, Failure):
                raise ForeshotError(f"{name}: {row.reason}\n{row.trace}".strip())
            said = f"FAILED: {row['failed']}" if "failed" in row else "measured"
            if "student" in row:
                said = f"ASR {row['student']['asr']['value']:.1%}"
            print(f"{count}/{len(jobs)} {name}: {said}", flush=True)
            yield jobs[number], row


def tried(work: Callable[[T], dict[str, Any]], job: T) -> dict[str, Any]:
    """What was measured of a job, or why it failed."""
    try:
        return work(job)
    except (ForeshotError, RuntimeError) as error:  # RuntimeError: torch's own
        return {"ok": False, "failed": str(error)}


def _run(preset: str, options: list[str], seed: int, device: str, folder: Path) -> dict[str, Any]:
    """One seed in a process of its own, timed from outside."""
    # Downloads are shared with the user's own runs; everything else starts from nothing, and
    # nothing is taken from another machine.
    store = folder / f"home-{os.getpid()}"
    store.mkdir(parents=True)
    (home() / "data").mkdir(parents=True, exist_ok=True)
    (store / "data").symlink_to((home() / "data").resolve())
    out, log = store / "run", store / "log.txt"
    arguments = [preset, *options, "--set", f"seed={seed}", "--device", device, "--out", str(out)]
    command = [sys.executable, "-m", "foreshot", "run", *arguments]
    with log.open("wb") as stream:
        began = time.perf_counter()
        child = subprocess.Popen(
            command,
            env=os.environ | {"FORESHOT_HOME": str(store), "FORESHOT_REMOTE": ""},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        # wait4 tells of this child alone; it imports all that this process does, and so it needs
        # more than what it inherits at the fork.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    row: dict[str, Any] = {
        "seed": seed,
        "ok": child.returncode == 0,
        "wall_seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_memory_mib": round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)),
    }
    if not row["ok"]:
        said = log.read_text(encoding="utf-8", errors="replace")
        return row | {"exit_code": child.returncode, "log_tail": said[-2000:]}
    metrics = read_json(out / "metrics.json")
    for model in (metrics["teacher"], metrics["student"], *metrics["controls"].values()):
        del model["per_class"]  # kept in the run folder; too long for a claim
    return row | {"metrics": metrics}


def main() -> None:
    """Parses the command line; exit code 1 if a seed failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", metavar="PRESET|FILE.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--runs", type=Path, help="keep stores, run folders and logs here")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="foreshot-claim-") as temporary:
        runs = given.runs or Path(temporary)
        try:
            claim = measure(
                given.preset, given.seeds, given.settings, given.out, runs.resolve(), given.device
            )
        except ForeshotError as error:
            print(f"measure: {error}", file=sys.stderr)
            sys.exit(2)
    sys.exit(1 if claim["failed"] else 0)


if __name__ == "__main__":
    main()
