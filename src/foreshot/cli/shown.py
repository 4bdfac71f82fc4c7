"""The commands that show what there is, and what came of runs."""

from pathlib import Path
from typing import Annotated

import typer

from foreshot.cli.common import DeviceName, Settings, Source

commands = typer.Typer()


@commands.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of them.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; report.html in the folder, or here.", show_default=False),
    ] = None,
    device: DeviceName = "auto",
) -> None:
    """Write a page about one run, or about several: one file, which needs no network.

    Of one run it shows the verdict, the poison, what the models say of triggered images, and how to
    run it again; of several a table to sort and to filter, and plots along what was varied.

        foreshot report runs/signs-3fa2b1c0
        foreshot report runs/sweep-signs-91fe20aa
        foreshot report runs/signs-* --out signs.html
    """
    from foreshot.report import write_report

    print(f"Report: {write_report(runs, out, device)}")


@commands.command("list")
def list_members() -> None:
    """List every preset, and every member of every family, one line each."""
    from foreshot.tables import print_families

    print_families()


@commands.command()
def show(
    preset: Source = "signs",
    settings: Settings = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of all configs instead.")
    ] = False,
) -> None:
    """Show a config in full, with every default.

    What it prints is a config itself: put it into a file, change it, and run the file. With the
    schema an editor completes the keys and says what they are.

        foreshot show fashion-mnist --set attack=cw
        foreshot show signs > mine.yaml
        foreshot show --schema > foreshot.schema.json
    """
    import json

    from foreshot.config import Config, dump, load_config
    from foreshot.schema import json_schema

    config = load_config(preset, settings or ())
    print(json.dumps(json_schema(Config), indent=1) if schema else dump(config).rstrip())
