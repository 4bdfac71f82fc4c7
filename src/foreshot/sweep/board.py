"""What a sweep shows: its plan, how far it is, and what came of it."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from foreshot.sweep.folder import SweepFolder
from foreshot.sweep.plan import Plan
from foreshot.tables import console, percent

SHOWN = 40
"""Rows of a table in the terminal."""
TAIL = 4096
"""Bytes at the end of a cell's events in which the last one is looked for."""


class Board:
    """How far a sweep is: done, running, failed, time left.

    Args:
        plan: what is to be done.
        folder: where.
        workers: how many cells run at once.
        say: what is done with a line; the table is for a terminal, the lines for all else.
    """

    def __init__(
        self, plan: Plan, folder: SweepFolder, workers: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.workers, self.say = folder, workers, say
        self.total = len(plan.cells)
        self.left = len(plan.todo)
        todo = {cell.name for cell in plan.todo}
        self.failed = {name: folder.failure(name) or "" for name in plan.failed - todo}
        self.running: dict[str, float] = {}
        self._took: list[float] = []

    def started(self, name: str) -> None:
        """A cell begins, or begins again."""
        self.running[name] = time.monotonic()
        self.say(f"started {name}")

    def ended(self, name: str, error: str | None) -> None:
        """A cell has ended."""
        self._took.append(time.monotonic() - self.running.pop(name))
        self.left -= 1
        if error is not None:
            self.failed[name] = error
        self.say(f"{'done' if error is None else 'FAILED'} {name}{f': {error}' if error else ''} "
                 f"({self.sentence})")  # fmt: skip

    @property
    def sentence(self) -> str:
        """Where the sweep stands."""
        done = self.total - self.left - len(self.failed)
        said = f"{done} of {self.total} done, {len(self.running)} running"
        said += f", {len(self.failed)} failed" if self.failed else ""
        if not self.left:
            return said
        if not self._took:
            return f"{said}, time left unknown"
        mean = sum(self._took) / len(self._took)
        return f"{said}, about {duration(mean * self.left / self.workers)} left"

    def __rich__(self) -> Group:
        table = Table("cell", "stage", "for")
        now = time.monotonic()
        for name, began in self.running.items():
            stage = last_stage(self.folder.run(name) / "events.jsonl")
            table.add_row(Text(name), Text(stage), duration(now - began))
        for name, error in list(self.failed.items())[-5:]:
            table.add_row(Text(name, "red"), Text(f"failed: {error}", "red"), "")
        return Group(Text(self.sentence, "bold"), table)


@contextmanager
def board(plan: Plan, folder: SweepFolder, workers: int) -> Iterator[Board]:
    """A board that stands on the terminal, or prints lines where there is none."""
    if not sys.stdout.isatty():
        yield Board(plan, folder, workers, lambda line: print(line, flush=True))
        return
    shown = Board(plan, folder, workers, lambda _: None)
    with Live(get_renderable=shown.__rich__, console=console, refresh_per_second=2):
        yield shown


def print_plan(plan: Plan) -> None:
    """Prints what a sweep would do, and about how long it would take."""
    state = dict.fromkeys(plan.done, "done") | dict.fromkeys(plan.failed, "failed")
    table = Table(title="Cells, in the order in which they are started")
    for column in ("cell", "settings", "now"):
        table.add_column(column, overflow="fold")
    names = {cell.name for cell in plan.todo}
    rest = [cell for cell in plan.cells if cell.name not in names]
    for cell in [*plan.todo, *rest][:SHOWN]:
        table.add_row(Text(cell.name), Text(" ".join(cell.varied)), state.get(cell.name, "new"))
    console.print(table)
    if len(plan.cells) > SHOWN:
        console.print(f"and {len(plan.cells) - SHOWN} more")
    stages = Table("stage", "used", "different", "there", title="Stages of the cells to run")
    for kind, uses in plan.uses.items():
        there = sum(step in plan.evidence.there for step in uses)
        stages.add_row(kind, *(str(number) for number in (uses.total(), len(uses), there)))
    if plan.todo:
        console.print(stages)
    over = len(plan.cells) - len(plan.todo)
    cost = "cost unknown: no run like these has finished here with as many threads"
    if plan.seconds is not None:
        cost = f"about {duration(plan.seconds)} of one worker's time, by what finished runs took"
    console.print(Text(f"{len(plan.todo)} cells to run, {over} not; {cost}."))


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """Prints what the cells measured: clean accuracy and ASR of the student."""
    table = Table(title="Students: rates in %, with Wilson 95 % intervals")
    table.add_column("cell")
    for column in ("clean accuracy", "ASR", "net ASR"):
        table.add_column(column, justify="right")
    done = [row for row in rows if row["state"] == "done"]
    for row in done[:SHOWN]:
        rates = ({key: row[f"student.{name}.{key}"] for key in ("value", "low", "high")}
                 for name in ("clean_accuracy", "asr"))  # fmt: skip
        net = row["student.asr_net"]
        shown = "" if net is None else f"{100 * net:+.1f}"
        table.add_row(Text(row["cell"]), *(percent(rate) for rate in rates), shown)
    console.print(table)
    if len(done) > SHOWN:
        console.print(f"and {len(done) - SHOWN} more")
    for row in rows:
        if row["state"] == "failed":
            console.print(Text(f"FAILED {row['cell']}: {row['error']}", "red"))


def last_stage(events: Path) -> str:
    """What a run is at, by the end of its events; empty if it has none yet."""
    try:
        with events.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            return json.loads(file.read().splitlines()[-1])["stage"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def duration(seconds: float) -> str:
    """A time, as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
