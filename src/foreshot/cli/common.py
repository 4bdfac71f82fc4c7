"""What commands share: where to run, and who hears of the progress."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from foreshot.progress import Listener

Source = Annotated[
    str, typer.Argument(metavar="PRESET|FILE.yaml", help="A preset (`foreshot list`) or a file.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the config; may be repeated."),
]
DeviceName = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run.")]


class TrackerName(StrEnum):
    """What `foreshot.trackers` has; typer repeats an enum's values, but no literals."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


Trackers = Annotated[
    list[TrackerName] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Keep the curves in tensorboard, mlflow or wandb too; may be repeated.",
    ),
]


ExecutorName = Annotated[
    Literal["serial", "processes", "ray"] | None,
    typer.Option(help="What the workers are; processes if there are several."),
]
WorkerCount = Annotated[int, typer.Option(min=1, help="How many work at once.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Torch's threads for each; the cores, divided by the workers."),
]
Gpus = Annotated[float, typer.Option(min=0, help="With ray: 0.25 lets four workers share a GPU.")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="A Ray cluster; else this machine.")
]


@contextmanager
def listening() -> Iterator["Listener"]:
    """A listener with progress bars on a terminal, with plain lines elsewhere."""
    from foreshot.progress import live, plain

    if sys.stdout.isatty():
        with live() as listener:
            yield listener
    else:
        yield plain
