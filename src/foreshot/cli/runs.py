"""The commands that run one experiment, or a part of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foreshot.cli.common import (
    DeviceName,
    ExecutorName,
    Gpus,
    RayAddress,
    Settings,
    Source,
    Threads,
    Trackers,
    WorkerCount,
    listening,
)
from foreshot.errors import ForeshotError

if TYPE_CHECKING:
    from foreshot.executor import Executor
    from foreshot.experiment import Until

commands = typer.Typer()

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
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch's threads; results depend on it.")
    ] = None,
    track: Trackers = None,
) -> None:
    """Run the whole experiment: teacher, poison, student, controls, evaluation.

    Without arguments it poisons a student of the embedded set `signs`, offline. Run the same
    command again to go on after an interruption; what is computed already is not computed again.
    To craft over several workers, run `foreshot poison` first, with the same --threads.

        foreshot run
        foreshot run fashion-mnist-10k --set trigger=grid --out runs/grid
        foreshot run signs --set attack=fgsm --set seed=3
        foreshot run signs --set defence=combined
        foreshot run mine.yaml --device cuda
        foreshot run signs --track tensorboard --track mlflow
    """
    from foreshot.tables import print_metrics

    folder, metrics = _experiment(
        preset, settings, out, device, "metrics", track=track, threads=threads
    )
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

    What follows, `foreshot poison` and the rest of `foreshot run` with the same config, finds it in
    the store.

        foreshot teacher fashion-mnist --set teacher.training.epochs=20
    """
    folder, _ = _experiment(preset, settings, out, device, "teacher")
    print(f"Teacher: {folder / 'teacher.safetensors'}")


@commands.command()
def poison(
    preset: Source = "signs",
    settings: Settings = None,
    out: Out = None,
    device: DeviceName = "auto",
    teacher: TeacherFile = None,
    executor: ExecutorName = None,
    workers: WorkerCount = 1,
    threads: Threads = None,
    gpus_per_run: Gpus = 0,
    ray_address: RayAddress = None,
) -> None:
    """Craft the poison, with a teacher that is trained, found in the store, or given.

    Several workers craft the same as one, if each has as many threads: the poison depends on that,
    to the last bit, and on nothing else. `foreshot run` with as many threads finds it in the store.

        foreshot poison signs --set attack.rate=0.01 --out runs/one-percent
        foreshot poison signs --teacher runs/signs/teacher.safetensors
        foreshot poison signs --workers 2 --threads 1
        foreshot poison mine.yaml --executor ray --workers 8 --threads 4 --ray-address HEAD:6379
    """
    from foreshot.workers import Workers

    crafters = Workers(
        engine=executor,
        workers=workers,
        threads=threads,
        gpus=gpus_per_run,
        address=ray_address,
        device=device,
    )
    known = preset, settings, out, device, "poison", teacher
    folder, _ = _experiment(*known, threads=crafters.threads_here, executor=crafters.executor)
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

    Teacher and poison are computed if they are neither given nor in the store. `foreshot evaluate`
    measures the student; `foreshot run` with the same config does that and the controls.

        foreshot distill signs --set distillation.terms.0.loss.temperature=1
        foreshot distill signs --poison runs/one-percent/poison.safetensors
    """
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

    Given a run folder, its own models are evaluated anew, from their files. Otherwise the models
    are those of --model, and the trigger that of the config.

        foreshot evaluate runs/signs
        foreshot evaluate signs --model student.safetensors --set trigger.size=5
    """
    from foreshot.config import load_config
    from foreshot.experiment import evaluate_files
    from foreshot.record import PATTERN
    from foreshot.tables import print_rates

    folder = Path(preset)
    inside = (folder / "config.yaml").is_file()
    config = load_config(str(folder / "config.yaml") if inside else preset, settings or ())
    files = list(model or [])
    if inside and not files:
        files = [folder / "teacher.safetensors", folder / "student.safetensors"]
        files = [f for f in files if f.exists()] + sorted(folder.glob("controls/*.safetensors"))
    if not files:
        raise ForeshotError("evaluate: expected a run folder or --model FILE, found neither")
    pattern = None
    if inside and (folder / PATTERN).exists():
        # What was learned is the trigger as long as no other one is asked for.
        own = load_config(folder / "config.yaml").trigger
        pattern = folder / PATTERN if config.trigger == own else None
    with listening() as listener:
        rates = evaluate_files(config, files, pattern=pattern, device=device, listener=listener)
    print_rates(rates, config.split)


def _experiment(
    preset: str,
    settings: list[str] | None,
    out: Path | None,
    device: Literal["auto", "cpu", "cuda"],
    until: "Until",
    teacher: Path | None = None,
    poison: Path | None = None,
    track: Trackers = None,
    threads: int | None = None,
    executor: "Executor | None" = None,
) -> tuple[Path, dict[str, Any]]:
    from foreshot.compute import with_threads
    from foreshot.config import load_config
    from foreshot.executor import HERE
    from foreshot.experiment import run
    from foreshot.files import file_digest
    from foreshot.progress import both
    from foreshot.store import content_hash
    from foreshot.trackers import tracking

    config = load_config(preset, settings or ())
    if out is None:
        given = [file and file_digest(file) for file in (teacher, poison)]
        key = content_hash([config.model_dump(mode="json"), *given])[:8]
        out = Path("runs") / f"{Path(preset).stem}-{key}"
    with (
        with_threads(threads),
        listening() as listener,
        tracking(track or (), config, out, listener) as tracked,
    ):
        metrics = run(
            config,
            out,
            until=until,
            device=device,
            listener=both(listener, tracked.hear),
            teacher=teacher,
            poison=poison,
            executor=executor or HERE,
        )
        tracked.finish(metrics)
    return out, metrics
