"""Many runs in one process: nothing is kept of those that are over."""

import gc
import os
import shutil
import threading
from pathlib import Path

import pytest
from processes import TEXT

from foreshot.config import parse
from foreshot.experiment import run

RUNS, WARM = 200, 20
GROWN = 64
"""MiB that the process may grow by after the first runs."""
STATUS = Path("/proc/self/status")
SMALL = (
    *("validation=0.9", "controls=[clean]", "defender={clean: 40, remove: 0.05}"),
    *("teacher.training.epochs=1", "student.training.epochs=1", "attack.steps=1"),
)


def held() -> dict[str, int]:
    """What this process holds: MiB of memory, open files, threads and child processes."""
    gc.collect()
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "memory": int(lines["VmRSS"].split()[0]) >> 10,
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": int(lines["Threads"]),
        "python threads": threading.active_count(),
        "children": len(children),
    }


def soak(root: Path, runs: int, warm: int) -> tuple[dict[str, int], dict[str, int]]:
    """What is held after the first runs and after all of them; each has a seed of its own."""
    early: dict[str, int] = {}
    for seed in range(runs):
        config = parse(TEXT, "tiny", [*SMALL, f"seed={seed}"])
        run(config, root / "out", store=root / "store", device="cpu")
        shutil.rmtree(root)
        if seed + 1 == warm:
            early = held()
        if (seed + 1) % warm == 0:
            print(seed + 1, held(), flush=True)
    return early, held()


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read off Linux' /proc")
@pytest.mark.parametrize(
    ("runs", "warm"), [(6, 3), pytest.param(RUNS, WARM, marks=pytest.mark.slow)]
)
def test_nothing_is_kept_of_runs_that_are_over(runs: int, warm: int, tmp_path: Path) -> None:
    early, late = soak(tmp_path / "root", runs, warm)
    assert late["memory"] <= early["memory"] + GROWN
    for kind in ("files", "threads", "python threads", "children"):
        assert late[kind] <= early[kind], kind
