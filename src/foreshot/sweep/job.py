"""A sweep from its definition to its table: what `foreshot sweep` does."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from foreshot.compute import Device, compute
from foreshot.config import Config
from foreshot.errors import ForeshotError
from foreshot.executor import Executor, Failure, Processes, Ray, Serial
from foreshot.experiment import run
from foreshot.files import locked
from foreshot.store import content_hash, home
from foreshot.sweep.board import board, print_plan, print_results
from foreshot.sweep.definition import Cell, Sweep
from foreshot.sweep.folder import SweepFolder, finished
from foreshot.sweep.plan import Evidence, Plan

Engine = Literal["serial", "processes", "ray"]


@dataclass(frozen=True)
class Job:
    """What to sweep over, and where.

    Args:
        sweep: the cells.
        out: folder of the sweep; runs/sweep-PRESET-HASH if None.
        engine: serial, processes or ray; None is serial for one worker, else processes.
        workers: cells at once.
        threads: of torch for each cell; None divides those that torch takes here between the
            workers. Results depend on it to the last bit, and stages are shared between equals.
        gpus: GPUs for each cell, of a Ray cluster.
        address: of the cluster; None is this machine.
        retry: whether cells that failed before are run again.
        device: where each cell runs.
    """

    sweep: Sweep
    out: Path | None = None
    engine: Engine | None = None
    workers: int = 1
    threads: int | None = None
    gpus: float = 0
    address: str | None = None
    retry: bool = True
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.engine == "serial" and self.workers > 1:
            raise ForeshotError(f"executor serial: expected 1 worker, found {self.workers}")
        if self.engine != "ray" and (self.gpus or self.address):
            raise ForeshotError(
                "--gpus-per-run, --ray-address: expected --executor ray, "
                f"found {self.engine or 'none'}"
            )
        if self.engine == "ray" and self.device == "cuda" and not self.gpus:
            raise ForeshotError(
                "--device cuda: expected --gpus-per-run above 0, as Ray hides the rest, found 0"
            )

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells; every config is valid."""
        return self.sweep.expand()

    @cached_property
    def folder(self) -> SweepFolder:
        """Where the cells run."""
        key = content_hash([cell.name for cell in self.cells])[:8]
        return SweepFolder(self.out or Path("runs") / f"sweep-{Path(self.sweep.preset).stem}-{key}")

    @property
    def executor(self) -> Executor:
        """What runs them."""
        if self.engine == "ray":
            return Ray(self.workers, self._threads, self.gpus, self.address)
        if self.engine == "processes" or self.workers > 1:
            return Processes(self.workers)
        return Serial()

    def plan(self) -> Plan:
        """What is to be done; computes nothing."""
        folder, names = self.folder, [cell.name for cell in self.cells]
        here = {"threads": self._threads, "device": None, "precision": None}
        if self.engine != "ray":  # who knows what the cluster has
            here |= compute(self.device, self.cells[0].config.precision).describe()
            here["threads"] = self._threads
        runs = [*folder.path.glob("*"), *folder.path.absolute().parent.glob("*")]
        done = {name for name in names if finished(folder.run(name))}
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
                threads=self._threads,
                device=self.device,
            )
            for cell in cells
        ]

    def run(self) -> int:
        """Runs what is to be run; returns how many cells have failed, now or before."""
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
        missing = (c.name for c in self.cells if not finished(folder.run(c.name)))
        return sum(folder.failure(name) is not None for name in missing)

    def print_plan(self) -> None:
        """Prints what would be done."""
        print_plan(self.plan())

    def print(self) -> None:
        """Prints what the cells measured."""
        print_results(self.folder.rows())
        print(f"Sweep folder: {self.folder.path}")

    @cached_property
    def _threads(self) -> int:
        return self.threads or max(1, torch.get_num_threads() // self.workers)


@dataclass(frozen=True)
class Task:
    """A cell, on its way to the process that runs it.

    Args:
        config: the experiment.
        out: its run folder.
        lock: what keeps two sweeps from running it at once.
        threads: of torch.
        device: where to run.
    """

    config: Config
    out: Path
    lock: Path
    threads: int
    device: Device


def perform(task: Task) -> None:
    """Runs a cell, unless another sweep has in the meantime."""
    before = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        with locked(task.lock):
            if not finished(task.out):
                run(task.config, task.out, device=task.device)
    finally:
        torch.set_num_threads(before)
