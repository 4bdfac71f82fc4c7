"""Trackers: a run's curves and metrics, where other tools show them. None can end a run."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshot.config import Config
from foreshot.errors import ForeshotError, brief, nearest, printable
from foreshot.extras import imported
from foreshot.progress import Event, Listener
from foreshot.report.settings import flat, leaves
from foreshot.together import leads
from foreshot.trackers.base import Tracker
from foreshot.trackers.mlflow import MLflow
from foreshot.trackers.tensorboard import TensorBoard
from foreshot.trackers.wandb import WandB

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
LONGEST = 80
"""Characters of a name; some trackers make a file of it."""


@dataclass(frozen=True, eq=False)
class Tracking:
    """The trackers of a run; one that fails is left out from there on.

    Args:
        opened: by name.
        listener: hears which have failed, and why.
    """

    opened: dict[str, Tracker]
    listener: Listener

    def hear(self, event: Event) -> None:
        """A listener: keeps the values of an epoch, against the images that its stage has seen."""
        if event.kind == "epoch":
            values = {cleaned(name): value for name, value in event.values.items()}
            self.each(lambda tracker: tracker.log(cleaned(event.stage), values, event.done))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Keeps the numbers of `metrics.json`, but those of single classes."""
        values = {
            cleaned(key): float(value)
            for key, value in flat(metrics).items()
            if isinstance(value, int | float) and "per_class" not in key.split(".")
        }
        self.each(lambda tracker: tracker.summarize(values))

    def each(self, act: Callable[[Tracker], None]) -> None:
        """Has every tracker do something."""
        for name, tracker in list(self.opened.items()):
            with self.surviving(name):
                act(tracker)

    @contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """A tracker's error is a note, and the end of the tracker."""
        try:
            yield
        except Exception as error:  # whatever its package raises: a server gone, a full disk
            self.opened.pop(name, None)
            reason = f"{printable(brief(error))}; it is left out from here on"
            self.listener(Event(f"tracker {name}", "note", message=reason))


def check(names: Sequence[str]) -> None:
    """Sees to it that there are such trackers, and their packages.

    Raises:
        ForeshotError: one is not there.
    """
    for name in names:
        if name not in TRACKERS:
            raise ForeshotError(f"tracker {name!r}: no such tracker; {nearest(name, TRACKERS)}")
        for variable, value in TRACKERS[name].environment.items():
            os.environ.setdefault(variable, value)
        imported(TRACKERS[name].package, "track", f"tracker {name}")


@contextmanager
def tracking(
    names: Sequence[str], config: Config, out: Path, listener: Listener
) -> Iterator[Tracking]:
    """Opens trackers for a run; at the end they are told whether it has failed.

        with tracking(["mlflow"], config, out, plain) as tracked:
            tracked.finish(run(config, out, listener=tracked.hear))

    What they keep on this machine lies beside the run folder, never in it. Of processes that train
    together, the first alone tracks.

    Args:
        names: of `TRACKERS`.
        config: what is run.
        out: the run folder; its name is the run's.
        listener: hears of trackers that fail.

    Raises:
        ForeshotError: there is no such tracker, its package is not there, or its folder would be
            the run folder.
    """
    check(names)
    out = Path(os.path.realpath(out))
    wanted = names if leads() else ()
    folders = {name: out.parent / TRACKERS[name].folder for name in wanted}
    if out in folders.values():
        raise ForeshotError(f"{out}: expected a run folder of another name, found a tracker's")
    tracked = Tracking({}, listener)
    params = {cleaned(key): value for key, value in leaves(config).items()}
    failed = True
    try:
        for name, folder in folders.items():
            with tracked.surviving(name):
                tracked.opened[name] = TRACKERS[name](folder, out.name, params)
        yield tracked
        failed = False
    finally:
        tracked.each(lambda tracker: tracker.close(failed))


def cleaned(name: str) -> str:
    """A name with "_" for what some tracker does not take: "/" above all, as some make files."""
    return re.sub(r"[^\w.: -]", "_", name)[:LONGEST].strip(". ") or "_"
