"""A sweep from its definition to its table: what `foreshot sweep` does."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from foreshot.compute import Device, compute, with_threads
from foreshot.config import Config
from foreshot.errors import ForeshotError
from foreshot.executor import Failure
from foreshot.experiment import run
from foreshot.files import locked
from foreshot.progress import plain
from foreshot.store import Store, content_hash, home
from foreshot.sweep.board import board, print_plan, print_results
from foreshot.sweep.definition import Cell, Sweep
from foreshot.sweep.folder import SweepFolder, complete
from foreshot.sweep.plan import Evidence, Plan
from foreshot.together import launched
from foreshot.trackers import check, tracking
from foreshot.workers import Workers


@dataclass(frozen=True)
class Job(Workers):
    """What to sweep over, and where; each worker runs a cell at a time.

    Args:
        sweep: the cells.
        out: folder of the sweep; runs/sweep-PRESET-HASH if None.
        retry: whether cells that failed before are run again.
        track: trackers of each cell, by name.
    """

    sweep: Sweep
    out: Path | None = None
    retry: bool = True
    track: Sequence[str] = ()

    def __post_init__(self) -> None:
        if launched():
            raise ForeshotError(
                "sweep: expected one process, found several of torchrun's; --workers runs several "
                "cells at once, and torchrun is for one large run"
            )
        super().__post_init__()

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells; every config is valid."""
        return self.sweep.expand()

    @cached_property
    def folder(self) -> SweepFolder:
        """Where the cells run."""
        key = content_hash([cell.name for cell in self.cells])[:8]
        return SweepFolder(self.out or Path("runs") / f"sweep-{Path(self.sweep.preset).stem}-{key}")

    def plan(self) -> Plan:
        """What is to be done; computes nothing."""
        folder, names = self.folder, [cell.name for cell in self.cells]
        here = {"threads": self.share, "device": None, "precision": None}
        if self.engine != "ray":  # who knows what the cluster has
            here |= compute(self.device, self.cells[0].config.precision).describe()
            here["threads"] = self.share
        runs = [*folder.path.glob("*"), *folder.path.absolute().parent.glob("*")]
        done = {name for name in names if complete(folder.run(name))}
        return Plan(
            cells=self.cells,
            done=frozenset(done),
            failed=frozenset(name for name in names if folder.failure(name)) - done,
            retry=self.retry,
            evidence=Evidence(runs, home() / "store", here),
        )

    def tasks(self, cells: Sequence[Cell]) -> list["Task"]:
        """What the executor is given for each of some cells."""
        return [
            Task(
                config=cell.config,
                out=self.folder.run(cell.name).resolve(),
                lock=self.folder.lock(cell.name).resolve(),
                threads=self.share,
                device=self.device,
                track=self.track,
            )
            for cell in cells
        ]

    def run(self) -> int:
        """Runs what is to be run; returns how many cells have failed, now or before."""
        check(self.track)
        Store.open()  # a remote that cannot be reached is one sentence, not one a cell
        plan, folder = self.plan(), self.folder
        folder.add(self.cells)
        names = [cell.name for cell in plan.todo]
        ended = self.executor.map(
            perform, self.tasks(plan.todo), lambda number: shown.started(names[number])
        )
        try:
            with board(plan, folder, self.workers) as shown, closing(ended):
                for number, outcome in ended:
                    failure = outcome if isinstance(outcome, Failure) else None
                    folder.note(names[number], failure)
                    shown.ended(names[number], failure and failure.reason)
        finally:
            folder.write_results()
        missing = (c.name for c in self.cells if not complete(folder.run(c.name)))
        return sum(folder.failure(name) is not None for name in missing)

    def print_plan(self) -> None:
        """Prints what would be done."""
        print_plan(self.plan())

    def print(self) -> None:
        """Prints what the cells measured."""
        print_results(self.folder.rows())
        print(f"Sweep folder: {self.folder.path}")


@dataclass(frozen=True)
class Task:
    """A cell, on its way to the process that runs it.

    Args:
        config: the experiment.
        out: its run folder.
        lock: what keeps two sweeps from running it at once.
        threads: of torch.
        device: where to run.
        track: trackers, by name.
    """

    config: Config
    out: Path
    lock: Path
    threads: int
    device: Device
    track: Sequence[str] = ()


def perform(task: Task) -> None:
    """Runs a cell, unless another sweep has in the meantime."""
    with with_threads(task.threads), locked(task.lock):
        if not complete(task.out):
            with tracking(task.track, task.config, task.out, plain) as tracked:
                metrics = run(task.config, task.out, device=task.device, listener=tracked.hear)
                tracked.finish(metrics)
