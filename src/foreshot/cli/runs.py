"""The commands that run experiments, and show what there is and what came of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foreshot.cli.common import DeviceName, listening
from foreshot.errors import ForeshotError

if TYPE_CHECKING:
    from foreshot.config import Config
    from foreshot.experiment import Until

commands = typer.Typer()

Source = Annotated[
    str, typer.Argument(metavar="PRESET|FILE.yaml", help="A preset (`foreshot list`) or a file.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the config; may be repeated."),
]
Out = Annotated[
    Path | None, typer.Option(help="Run folder; runs/PRESET-HASH if not given.", show_default=False)
]
TeacherFile = Annotated[
    Path | None,
    typer.Option("--teacher", help="A model file to use in place of training a teacher."),
]
PoisonFile = Annotated[
    Path | None, typer.Option("--poison", help="A poison file to use in place of crafting.")
]


@commands.command()
def run(
    preset: Source = "signs",
    settings: Settings = None,
    out: Out = None,
    device: DeviceName = "auto",
) -> None:
    """Run the whole experiment: teacher, poison, student, controls, evaluation.

    Without arguments it poisons a student of the embedded set `signs`, offline. Run the same
    command again to go on after an interruption; what is computed already is not computed again.

        foreshot run
        foreshot run fashion-mnist-10k --set trigger.name=grid --out runs/grid
        foreshot run signs --set attack.name=fgsm --set seed=3
        foreshot run signs --set defence.name=combined
        foreshot run mine.yaml --device cuda
    """
    from foreshot.tables import print_metrics

    folder, metrics = _experiment(preset, settings, out, device, "metrics")
    print_metrics(metrics)
    print(f"Run folder: {folder}")
    print(f"Report: {folder / 'report.html'}")


@commands.command()
def teacher(
    preset: Source = "signs",
    settings: Settings = None,
    out: Out = None,
    device: DeviceName = "auto",
) -> None:
    """Train the clean teacher only.

    foreshot teacher fashion-mnist --set teacher.training.epochs=20
    """  # fmt: skip
    folder, _ = _experiment(preset, settings, out, device, "teacher")
    print(f"Teacher: {folder / 'teacher.safetensors'}")


@commands.command()
def poison(
    preset: Source = "signs",
    settings: Settings = None,
    out: Out = None,
    device: DeviceName = "auto",
    teacher: TeacherFile = None,
) -> None:
    """Craft the poison, with a teacher that is trained, found in the store, or given.

    foreshot poison signs --set attack.rate=0.01 --out runs/one-percent
    foreshot poison signs --teacher runs/signs/teacher.safetensors
    """  # fmt: skip
    folder, _ = _experiment(preset, settings, out, device, "poison", teacher)
    print(f"Poison: {folder / 'poison.safetensors'} (look at {folder / 'poison.png'})")


@commands.command()
def distill(
    preset: Source = "signs",
    settings: Settings = None,
    out: Out = None,
    device: DeviceName = "auto",
    teacher: TeacherFile = None,
    poison: PoisonFile = None,
) -> None:
    """Distil the student on the poisoned transfer set, without controls and evaluation.

    foreshot distill signs --set distillation.terms.0.loss.temperature=1
    foreshot distill signs --poison runs/one-percent/poison.safetensors
    """  # fmt: skip
    folder, _ = _experiment(preset, settings, out, device, "student", teacher, poison)
    print(f"Student: {folder / 'student.safetensors'}")


@commands.command()
def evaluate(
    preset: Annotated[
        str, typer.Argument(metavar="RUN|PRESET|FILE.yaml", help="A run folder, or a config.")
    ] = "signs",
    model: Annotated[
        list[Path] | None,
        typer.Option("--model", help="A model file to evaluate; may be repeated."),
    ] = None,
    settings: Settings = None,
    device: DeviceName = "auto",
) -> None:
    """Evaluate models with an experiment's test split, trigger and target.

    Given a run folder, its own models are evaluated anew, from their files.

        foreshot evaluate runs/signs
        foreshot evaluate signs --model student.safetensors --set trigger.size=5
    """
    from foreshot.experiment import evaluate_files
    from foreshot.record import PATTERN
    from foreshot.tables import print_rates

    folder = Path(preset)
    inside = (folder / "config.yaml").is_file()
    config = _config(str(folder / "config.yaml") if inside else preset, settings)
    files = list(model or [])
    if inside and not files:
        files = [folder / "teacher.safetensors", folder / "student.safetensors"]
        files = [f for f in files if f.exists()] + sorted(folder.glob("controls/*.safetensors"))
    if not files:
        raise ForeshotError("evaluate: expected a run folder or --model FILE, found neither")
    with listening() as listener:
        pattern = folder / PATTERN if (folder / PATTERN).exists() else None
        rates = evaluate_files(config, files, pattern=pattern, device=device, listener=listener)
    print_rates(rates, config.split)


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
    executor: Annotated[
        Literal["serial", "processes", "ray"] | None,
        typer.Option(help="What runs the cells; processes if there are several workers."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at once.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Torch's threads for each; the cores, divided by the workers."),
    ] = None,
    gpus_per_run: Annotated[
        float, typer.Option(min=0, help="With ray: 0.25 lets four runs share a GPU.")
    ] = 0,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A Ray cluster; else this machine.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry/--no-retry", help="Run again what failed before.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost, and run nothing.")
    ] = False,
    device: DeviceName = "auto",
) -> None:
    """Run many experiments that differ in some settings; each shared stage is computed once.

    A value is YAML; a:b stands for the integers from a to b - 1. Run the same command again to go
    on: finished cells are skipped. The exit code is 1 if a cell has failed. Results depend on the
    number of threads, to the last bit.

        foreshot sweep signs --grid attack.rate=0.001,0.01,0.05 --grid seed=0:3
        foreshot sweep signs --grid defence.name=null,combined --dry-run
        foreshot sweep mine.yaml --workers 4
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
    )
    if dry_run:
        job.print_plan()
        return
    failed = job.run()
    job.print()
    if failed:
        raise typer.Exit(1)


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

    foreshot show fashion-mnist --set attack.name=cw
    foreshot show --schema > foreshot.schema.json
    """  # fmt: skip
    import json

    from foreshot.config import Config, dump

    config = _config(preset, settings)
    print(json.dumps(Config.model_json_schema(), indent=1) if schema else dump(config), end="\n")


def _config(preset: str, settings: list[str] | None) -> "Config":
    from foreshot.config import load_config

    return load_config(preset, settings or ())


def _experiment(
    preset: str,
    settings: list[str] | None,
    out: Path | None,
    device: Literal["auto", "cpu", "cuda"],
    until: "Until",
    teacher: Path | None = None,
    poison: Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    from foreshot.experiment import run
    from foreshot.files import file_digest
    from foreshot.store import content_hash

    config = _config(preset, settings)
    if out is None:
        given = [file and file_digest(file) for file in (teacher, poison)]
        key = content_hash([config.model_dump(mode="json"), *given])[:8]
        out = Path("runs") / f"{Path(preset).stem}-{key}"
    with listening() as listener:
        metrics = run(
            config,
            out,
            until=until,
            device=device,
            listener=listener,
            teacher=teacher,
            poison=poison,
        )
    return out, metrics
