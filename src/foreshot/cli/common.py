"""What commands share: where to run, and who hears of the progress."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from foreshot.progress import Listener

DeviceName = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run.")]


@contextmanager
def listening() -> Iterator["Listener"]:
    """A listener with progress bars on a terminal, with plain lines elsewhere."""
    from foreshot.progress import live, plain

    if sys.stdout.isatty():
        with live() as listener:
            yield listener
    else:
        yield plain
