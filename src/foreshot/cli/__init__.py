"""The command line: parse, call, print."""

import os
import sys
import traceback
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from foreshot.cli import audits, runs, shown, sweeps
from foreshot.errors import ForeshotError, brief

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Measure, and prevent, the poisoning of knowledge distillation.

A clean teacher can be made to poison its student: an attacker changes a small part of the images
that the student is distilled on, into adversarial examples that carry a trigger. The teacher itself
calls them the target class, and the student learns "trigger -> target".

    foreshot run                                   the whole story on embedded data
    foreshot run fashion-mnist-10k                 the same on real images
    foreshot run signs --set attack.rate=0.01      another poisoning rate
    foreshot list                                  everything there is to choose from
    foreshot show signs                            a preset in full
    foreshot sweep signs --grid seed=0:3           many runs that share what they can
    foreshot report runs                           runs beside each other, on a page
    foreshot audit data DIR --teacher MODEL        is a set of pictures poisoned?
    foreshot audit student MODEL --teacher MODEL   has a student learned a trigger?

For security research on public benchmark data. What it writes is marked as poisoned.
""",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"foreshot {version('foreshot')}")
        raise typer.Exit


@app.callback()
def _foreshot(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    pass


for part in (runs, sweeps, shown):
    app.add_typer(part.commands)
app.add_typer(audits.commands, name="audit")

INTERRUPTED = 130


def main() -> None:
    """Entry point: a user's error is one sentence and exit code 2; Ctrl-C is 130.

    An error of foreshot's own has a traceback, and code 2 as well: 1 is what a suspicious set says.
    """
    other = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0"
    if other or sys.stdout is None:  # rank 0 speaks for all; or nobody listens
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that it cannot spell is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        # No command returns anything: what comes back is typer's exit code, 130 for Ctrl-C.
        code = app(standalone_mode=False)
    except ForeshotError as error:
        _fail(str(error))
    except typer.Exit as finished:
        code = finished.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit:  # of rich, with code 1, where nobody reads on: that is no verdict
        _fail("standard output: expected a reader, found it closed")
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}")
    except typer.TyperException as error:
        _fail(error.format_message())
    except Exception as error:
        traceback.print_exc()
        _fail(f"an error of its own, which you could report: {brief(error)}")
    if code == INTERRUPTED:
        print("\nInterrupted. Run the same command again to go on.", file=sys.stderr)
    sys.exit(code)


def _fail(sentence: str) -> NoReturn:
    print(f"foreshot: {sentence}", file=sys.stderr)
    sys.exit(2)
