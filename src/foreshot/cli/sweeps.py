"""The command that runs many experiments."""

from pathlib import Path
from typing import Annotated

import typer

from foreshot.cli.common import (
    DeviceName,
    ExecutorName,
    Gpus,
    RayAddress,
    Settings,
    Threads,
    Trackers,
    WorkerCount,
)

commands = typer.Typer()


@commands.command()
def sweep(
    source: Annotated[
        str, typer.Argument(metavar="SWEEP.yaml|PRESET|FILE.yaml", help="What to vary.")
    ],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=A,B,C", help="Values of a key; keys cross."),
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Sweep folder; runs/sweep-PRESET-HASH if not given.")
    ] = None,
    executor: ExecutorName = None,
    workers: WorkerCount = 1,
    threads: Threads = None,
    gpus_per_run: Gpus = 0,
    ray_address: RayAddress = None,
    retry: Annotated[
        bool, typer.Option("--retry/--no-retry", help="Run again what failed before.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost, and run nothing.")
    ] = False,
    device: DeviceName = "auto",
    track: Trackers = None,
) -> None:
    """Run many experiments that differ in some settings; each shared stage is computed once.

    A value is YAML; a:b stands for the integers from a to b - 1. Run the same command again to go
    on: finished cells are skipped. The exit code is 1 if a cell has failed. Results depend on the
    number of threads, to the last bit.

        foreshot sweep signs --grid attack.rate=0.001,0.01,0.05 --grid seed=0:3
        foreshot sweep signs --grid defence=null,combined --dry-run
        foreshot sweep mine.yaml --workers 4 --track mlflow
        foreshot sweep mine.yaml --executor ray --workers 8 --gpus-per-run 0.25
    """
    from foreshot.sweep import Job, load_sweep

    job = Job(
        sweep=load_sweep(source, grid or (), settings or ()),
        out=out,
        engine=executor,
        workers=workers,
        threads=threads,
        gpus=gpus_per_run,
        address=ray_address,
        retry=retry,
        device=device,
        track=track or (),
    )
    if dry_run:
        job.print_plan()
        return
    failed = job.run()
    job.print()
    if failed:
        raise typer.Exit(1)
