"""The story: a clean teacher, poison, a student, its controls, and what they do."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from foreshot.compute import Device, compute
from foreshot.config import Config
from foreshot.defences import Monitor
from foreshot.defences.scoring import quality
from foreshot.executor import HERE, Executor
from foreshot.files import read_json
from foreshot.guard import Guard, Guarded
from foreshot.models.checkpoint import state_digest
from foreshot.progress import Listener, both, silent, write_events
from foreshot.record import PATTERN, RunFolder, load_run
from foreshot.report import write_page
from foreshot.stages import Crafted, Stages, Trained
from foreshot.store import Artefact, Store, home
from foreshot.together import joined

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
    executor: Executor = HERE,
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
        executor: where poison is crafted, such as `Processes(4)`; it is the same everywhere.

    Returns:
        What `metrics.json` holds; empty if `until` stops before.

    Raises:
        ForeshotError: the config does not fit the data, a file is not what it should be, or `out`
            holds another experiment.
    """
    with joined(out, listener, device) as (out, listener):
        engine = compute(device, config.precision)
        folder = RunFolder(out, config)
        listener = both(listener, write_events(folder.path / "events.jsonl"))
        shared = Store.open(listener, store)
        stages = Stages(config, shared, engine, home() / "data", listener, executor)
        data = stages.data
        given = None if teacher is None else stages.adopt_model(teacher)
        stages.check(given)
        folder.claim()  # nothing is written for what is refused at once

        honest = given or stages.teacher()
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

        guard = Guard(stages)
        defended = {"student": guard.student(taught, crafted)}
        for file in defended["student"].files:
            folder.add(file.name, file)
        folder.add("student.safetensors", defended["student"].student.path)
        if until == "student":
            return folder.finish(stages.digests, engine)

        crafts, tutors = {"student": crafted}, {"student": taught}
        for name in config.controls:
            crafts[name] = stages.control(name, taught, crafted)
            tutors[name] = honest if name == "clean" else taught  # no attack, of whichever kind
            defended[name] = guard.student(tutors[name], crafts[name], f"control: {name}")
            folder.add(f"controls/{name}.safetensors", defended[name].student.path)

        students = {name: done.student for name, done in defended.items()}
        beside = dict(defended["student"].teachers)
        if (before_defence := defended["student"].undefended) is not None:
            beside[UNDEFENDED] = before_defence
        measured, last = stages.evaluation(taught, crafted, students | beside)
        about = {"sha256_before": before, "sha256_after": state_digest(taught.model)}
        parts = {"teacher": honest, "poison": crafted, "distill": defended["student"].distilled}
        if config.compromise is not None:
            about["compromise"] = config.compromise.name
            parts["compromise"] = taught
        parts |= defended["student"].teachers
        rates = {name: measured.pop(name) for name in beside}
        defence, watching = _defence(guard, tutors, crafts, defended, rates)
        made = {name: stage.artefact for name, stage in parts.items()} | stages.attackers
        others = [crafts[name].artefact for name in config.controls]
        seconds = _seconds(made, others, defended, watching, last)
        metrics = (
            {"schema": 1, "split": config.split} | _metrics(measured, about, seconds) | defence
        )
        folder.finish(stages.digests, engine, metrics)
        write_page(load_run(out), stages.parts, engine)
        return metrics


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
    store = Store.open(listener)
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
    guard: Guard,
    tutors: Mapping[str, Trained],
    crafts: Mapping[str, Crafted],
    defended: Mapping[str, Guarded],
    beside: dict[str, dict[str, Any]],
) -> tuple[dict[str, Any], float]:
    """What the defence did for the student and the controls; empty without a defence.

    Args:
        guard: the defender.
        tutors: whom each student was to learn from.
        crafts: what lay in the set of each.
        defended: each student, the poisoned one first.
        beside: rates of the other models that the defence needed for that one.

    Returns:
        The block of `metrics.json`, and the seconds that a monitor took.
    """
    config, seconds = guard.config, 0.0
    if config.defence is None:
        return {}, seconds
    worth: dict[str, dict[str, Any]] = {}
    for name, done in defended.items():
        worth[name] = {}
        if done.screened is not None:
            worth[name] = quality(done.screened.verdict, crafts[name].poison, config.target)
        elif isinstance(config.defence, Monitor):
            label = name if name == "student" else f"control: {name}"
            kept = guard.watch(tutors[name], crafts[name], done.student, label)
            worth[name] = read_json(kept.folder / "watch.json")
            seconds += kept.seconds
    about = {"name": config.defence.name, "kind": config.defence.kind, **worth.pop("student")}
    about["controls"] = {name: of_one for name, of_one in worth.items() if of_one}
    return {"defence": about | beside}, seconds


def _seconds(
    stages: Mapping[str, Artefact],
    others: Iterable[Artefact],
    defended: Mapping[str, Guarded],
    watching: float,
    last: float,
) -> dict[str, float]:
    """What each stage took when it was computed, in seconds; `distill` is the student alone.

    Args:
        stages: by name.
        others: the poison of the controls.
        defended: the student, and those of the controls.
        watching: what a monitor took.
        last: the evaluation.
    """
    parts = {name: stage.seconds for name, stage in stages.items()}
    guarded, *controls = defended.values()
    if guarded.seconds + watching:
        parts["defence"] = guarded.seconds + watching
    # Without an attack, the clean control is the student itself, and its poison is the same.
    known = {stage.folder for stage in stages.values()}
    crafts = {craft.folder: craft.seconds for craft in others}
    students = {
        done.distilled.artefact.folder: done.seconds + done.distilled.artefact.seconds
        for done in controls
    }
    parts["controls"] = sum(
        seconds for folder, seconds in (crafts | students).items() if folder not in known
    )
    parts["evaluate"] = last
    parts = {name: round(seconds, 3) for name, seconds in parts.items()}
    return parts | {"total": round(sum(parts.values()), 3)}
