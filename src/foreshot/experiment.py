"""The story: a clean teacher, poison, a student, its controls, and what they do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from foreshot.compute import Device, compute
from foreshot.config import Config
from foreshot.defences.scoring import quality
from foreshot.models.checkpoint import state_digest
from foreshot.poison import Poison
from foreshot.progress import Listener, both, silent, write_events
from foreshot.record import PATTERN, RunFolder
from foreshot.stages import Crafted, Screened, Stages, Trained
from foreshot.store import Store, home

Until = Literal["teacher", "poison", "student", "metrics"]
UNDEFENDED = "undefended"
"""The student of the whole transfer set, where a defence had to distil it."""


def run(
    config: Config,
    out: Path,
    *,
    until: Until = "metrics",
    device: Device = "auto",
    listener: Listener = silent,
    store: Path | None = None,
    teacher: Path | None = None,
    poison: Path | None = None,
) -> dict[str, Any]:
    """Runs an experiment into a folder; run it again to go on where it was interrupted.

    Args:
        config: what to run.
        out: the run folder, complete in itself when this returns.
        until: the last stage to run.
        device: auto, cpu or cuda.
        listener: hears of the progress.
        store: where finished stages are shared; `$FORESHOT_HOME/store` if None.
        teacher: a model file to use in place of training a teacher.
        poison: a poison file to use in place of crafting.

    Returns:
        What `metrics.json` holds; empty if `until` stops before.

    Raises:
        ForeshotError: the config does not fit the data, a file is not what it should be, or `out`
            holds another experiment.
    """
    engine = compute(device, config.precision)
    folder = RunFolder(out, config)
    listener = both(listener, write_events(folder.path / "events.jsonl"))
    root = store or home() / "store"
    stages = Stages(config, Store(root, listener), engine, home() / "data", listener)
    data = stages.data
    folder.claim()

    honest = stages.teacher() if teacher is None else stages.adopt_model(teacher)
    taught = honest if config.compromise is None else stages.compromise(honest)
    before = state_digest(taught.model)
    folder.add("teacher.safetensors", taught.path)
    if until == "teacher":
        return folder.finish(stages.digests, engine)

    pattern = stages.learn_trigger(honest)
    if pattern is not None:
        folder.add(PATTERN, pattern)
    crafted = stages.poison(taught) if poison is None else stages.adopt_poison(poison)
    folder.add("poison.safetensors", crafted.path)
    folder.draw(data.train, crafted.poison, stages.trigger, taught.model, engine)
    if until == "poison":
        return folder.finish(stages.digests, engine)

    screened = stages.screen(taught, crafted)
    if screened is not None:
        for file in screened.paths:
            folder.add(file.name, file)
    student = stages.student(taught, crafted, screened=screened)
    folder.add("student.safetensors", student.path)
    if until == "student":
        return folder.finish(stages.digests, engine)

    controls: dict[str, Trained] = {}
    screenings = {"student": (screened, crafted.poison)}
    for name in config.controls:
        other = stages.control(name, taught, crafted)
        tutor = honest if name == "clean" else taught  # no attack, of whichever kind
        passed = stages.screen(tutor, other, f"screen of {name}")
        screenings[name] = passed, other.poison
        controls[name] = stages.student(tutor, other, f"control: {name}", passed)
        folder.add(f"controls/{name}.safetensors", controls[name].path)

    students = {"student": student, **controls}
    if screened is not None and screened.student is not None:
        students[UNDEFENDED] = screened.student
    measured, last = stages.evaluation(taught, crafted, students)
    about = {"sha256_before": before, "sha256_after": state_digest(taught.model)}
    parts: dict[str, Trained | Crafted] = {"teacher": honest, "poison": crafted, "distill": student}
    if config.compromise is not None:
        about["compromise"] = config.compromise.name
        parts["compromise"] = taught
    if screened is not None and screened.second is not None:
        parts["second_teacher"] = screened.second
    defence = _defence(config, screenings, measured.pop(UNDEFENDED, None))
    seconds = _seconds(parts, controls, [passed for passed, _ in screenings.values()], last)
    metrics = {"schema": 1, "split": config.split} | _metrics(measured, about, seconds) | defence
    return folder.finish(stages.digests, engine, metrics)


def evaluate_files(
    config: Config,
    models: list[Path],
    *,
    pattern: Path | None = None,
    device: Device = "auto",
    listener: Listener = silent,
) -> dict[str, dict[str, Any]]:
    """Evaluates model files with a config's test set, trigger and target.

    A trigger that is learned has to be given, as the picture `pattern`.
    """
    store = Store(home() / "store", listener)
    stages = Stages(config, store, compute(device, config.precision), home() / "data", listener)
    stages.adopt_trigger(pattern)
    adopted = {str(path): stages.adopt_model(path) for path in models}
    return {name: stages.evaluate(model.model, stages.data.test) for name, model in adopted.items()}


def _metrics(
    measured: dict[str, Any], about: dict[str, str], seconds: dict[str, float]
) -> dict[str, Any]:
    """The body of `metrics.json`, of what the evaluation measured."""
    poison, teacher = measured.pop("poison"), measured.pop("teacher")
    clean = measured["clean"]["asr"]["value"] if "clean" in measured else None
    for model in measured.values():
        model["asr_net"] = None if clean is None else model["asr"]["value"] - clean
    return {
        "teacher": teacher | about,
        "student": measured.pop("student"),
        "controls": measured,
        "poison": poison,
        "seconds": seconds,
    }


def _defence(
    config: Config,
    screenings: dict[str, tuple[Screened | None, Poison]],
    undefended: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the defence did to the student's set and to the controls'; empty without a defence."""
    if config.defence is None:
        return {}
    worth = {
        name: quality(passed.verdict, poison, config.target)
        for name, (passed, poison) in screenings.items()
        if passed is not None
    }
    about = {"name": config.defence.name, **worth.pop("student"), "controls": worth}
    return {"defence": about if undefended is None else {**about, UNDEFENDED: undefended}}


def _seconds(
    stages: Mapping[str, Trained | Crafted],
    controls: dict[str, Trained],
    screenings: Sequence[Screened | None],
    last: float,
) -> dict[str, float]:
    """What each stage took when it was computed, in seconds; `distill` is the student alone."""
    screens = [passed.seconds for passed in screenings if passed is not None]
    parts = {name: stage.artefact.seconds for name, stage in stages.items()}
    if screens:
        parts["defence"] = screens[0]
    parts |= {
        "controls": sum(screens[1:], sum(t.artefact.seconds for t in controls.values())),
        "evaluate": last,
    }
    parts = {name: round(seconds, 3) for name, seconds in parts.items()}
    return parts | {"total": round(sum(parts.values()), 3)}
