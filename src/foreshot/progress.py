"""What happens while foreshot works, as events; whoever wants to show or keep them listens."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from foreshot.files import naming


@dataclass(frozen=True)
class Event:
    """One step of a stage.

    Args:
        stage: what is worked on, such as "teacher" or "poison".
        kind: start, advance (may come many times a second), epoch (a milestone with its values),
            note (a sentence for the user) or end.
        done, total: images done and to do, where that is known.
        values: figures such as loss, learning rate or seconds.
        message: the sentence of a note; of a start, how much there is to do; of an epoch, which.
    """

    stage: str
    kind: Literal["start", "advance", "epoch", "note", "end"]
    done: int = 0
    total: int = 0
    values: dict[str, float] = field(default_factory=dict)
    message: str = ""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """A listener that does nothing."""


def both(*listeners: Listener) -> Listener:
    """A listener that tells each of several."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


def write_events(path: Path) -> Listener:
    """A listener that appends each event but the frequent `advance` to a JSON-lines file.

    What comes before there is a folder for it is kept until then.
    """
    waiting: list[str] = []
    written = path.read_bytes() if path.exists() else b""
    lead = "" if written.endswith(b"\n") or not written else "\n"  # of a line that was cut off

    def write(event: Event) -> None:
        nonlocal lead
        if event.kind != "advance":
            line = json.dumps({"time": round(time.time(), 3), **asdict(event)})
            waiting.append(f"{line}\n")
            if path.parent.is_dir():
                with naming(path), path.open("a", encoding="utf-8") as file:
                    file.write(lead + "".join(waiting))
                waiting.clear()
                lead = ""

    return write


def plain(event: Event) -> None:
    """A listener for logs and pipes: one line a milestone."""
    if event.kind == "advance" or (event.kind == "start" and not event.total):
        return
    size = f"{event.total:,} images" if event.kind == "start" else ""
    values = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
    text = ", ".join(filter(None, (event.message, values))) or size
    print(f"[{event.stage}] {event.kind}{': ' * bool(text)}{text}", flush=True)


@contextmanager
def live() -> Iterator[Listener]:
    """A listener that shows rich progress bars on a terminal: images/s, loss, time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns) as bars:

        def show(event: Event) -> None:
            if event.kind == "note":
                bars.console.print(f"[bold]{event.stage}[/]: ", end="")
                bars.console.print(event.message, markup=False)
                return
            if event.kind == "start" and event.total:
                tasks[event.stage] = bars.add_task(
                    event.stage, total=event.total, completed=event.done, rate="", values=""
                )
            elif event.stage in tasks:
                task = tasks[event.stage]
                if event.values:
                    text = " ".join(f"{k} {v:.3g}" for k, v in event.values.items())
                    bars.update(task, values=text)
                if event.kind != "end":
                    bars.update(task, completed=event.done)
                speed = bars.tasks[bars.task_ids.index(task)].speed
                if speed:
                    bars.update(task, rate=f"{speed:,.0f}/s")

        yield show
