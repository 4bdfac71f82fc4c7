"""Trackers: what they keep is read back with their own packages, and none can end a run."""

import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ARCHITECTURE, CLASSES, DIGITS, stripes
from foreshot.cli import main
from foreshot.cli.common import TrackerName
from foreshot.compute import CPU
from foreshot.config import Config, load_config, parse
from foreshot.errors import ForeshotError
from foreshot.experiment import run
from foreshot.files import read_json
from foreshot.models import build
from foreshot.progress import Event
from foreshot.report.settings import leaves
from foreshot.sweep import load_sweep
from foreshot.trackers import TRACKERS, cleaned, tracking
from foreshot.training import Samples, Supervised, Training, fit

HParams = import_module("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
Record = import_module("wandb.proto.wandb_internal_pb2").Record
ALL = list(TRACKERS)
RATE = {"value": 0.75, "hits": 3, "total": 4, "low": 0.3, "high": 0.95}
METRICS = {
    "schema": 1,
    "split": "test",
    "student": {"asr": RATE, "asr_net": None, "per_class": {"a/b.c": RATE}},
    "controls": {"clean": {"clean_accuracy": RATE | {"value": 0.5}}},
}
KEPT = {"student.asr.value": 0.75, "controls.clean.clean_accuracy.value": 0.5}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> Path:
    """An empty folder, an empty home, no net, and none of the variables that trackers read."""
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(DIGITS)
    return tmp_path


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("digits")


class Read:
    """What trackers hold of a run, by the run's name."""

    def __init__(self, folder: Path, name: str, trackers: Sequence[str] = ALL) -> None:
        self.curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.params: dict[str, dict[str, str]] = {}
        self.ended: dict[str, str] = {}
        self.summary: dict[str, dict[str, float]] = {}
        for tracker in trackers:
            getattr(self, f"_{tracker}")(folder, name)

    def _tensorboard(self, folder: Path, name: str) -> None:
        read = EventAccumulator(str(folder / "tensorboard" / name), {"scalars": 0})
        read.Reload()
        scalars = {
            tag: [(event.step, event.value) for event in read.Scalars(tag)]
            for tag in read.Tags()["scalars"]
        }
        known = {
            tag: HParams.FromString(content)
            for tag, content in read.PluginTagToContent("hparams").items()
        }
        hparams = known["_hparams_/session_start_info"].session_start_info.hparams
        self.curves["tensorboard"] = {k: v for k, v in scalars.items() if k[:8] != "metrics/"}
        self.summary["tensorboard"] = {
            k[8:]: v[-1][1] for k, v in scalars.items() if k[:8] == "metrics/"
        }
        self.params["tensorboard"] = {
            key: str(getattr(value, value.WhichOneof("kind"))) for key, value in hparams.items()
        }
        status = known["_hparams_/session_end_info"].session_end_info.status
        self.ended["tensorboard"] = {1: "finished", 2: "failed"}[status]

    def _mlflow(self, folder: Path, name: str) -> None:
        client = mlflow.MlflowClient((folder / "mlruns").as_uri())
        (home,) = client.search_experiments()
        assert home.name == "foreshot"
        (found,) = [r for r in client.search_runs([home.experiment_id]) if r.info.run_name == name]
        kept = {
            key: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, key)]
            for key in found.data.metrics
        }
        self.curves["mlflow"] = {key: points for key, points in kept.items() if "/" in key}
        self.summary["mlflow"] = {k: points[-1][1] for k, points in kept.items() if "/" not in k}
        self.params["mlflow"] = found.data.params
        self.ended["mlflow"] = found.info.status.lower()

    def _wandb(self, folder: Path, name: str) -> None:
        self.curves["wandb"], self.summary["wandb"] = {}, {}
        for record in settled(folder, name):
            if record.HasField("run"):
                self.params["wandb"] = {
                    item.key: str(json.loads(item.value_json))
                    for item in record.run.config.update
                    if item.key != "_wandb"
                }
            if record.HasField("history"):
                values = {i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                for key in values:
                    if "/" in key and not key.endswith("/images"):
                        step = values[f"{key.split('/')[0]}/images"]
                        self.curves["wandb"].setdefault(key, []).append((step, values[key]))
            if record.HasField("summary"):
                for item in record.summary.update:
                    if item.key and item.key[0] != "_":
                        self.summary["wandb"][item.key] = json.loads(item.value_json)
            if record.HasField("exit"):
                self.ended["wandb"] = "failed" if record.exit.exit_code else "finished"


def settled(folder: Path, name: str) -> list[Any]:
    """The records of wandb's offline file of a run; its service may write the last of them late."""
    for _ in range(100):
        for file in folder.glob("wandb/offline-run-*/run-*.wandb"):
            kept = list(records(file.read_bytes()))
            if any(r.run.display_name == name for r in kept) and kept[-1].HasField("exit"):
                return kept
        time.sleep(0.1)
    raise AssertionError(f"{folder}: expected a whole offline run {name}")


def records(data: bytes) -> Iterator[Any]:
    """The records of an offline file: LevelDB's log, 32 KiB a block, after 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + size > len(data):
            return
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def epoch(stage: str, done: int, **values: float) -> Event:
    return Event(stage, "epoch", done, 300, values)


def test_each_tracker_keeps_config_curves_and_metrics(here: Path, config: Config) -> None:
    notes: list[Event] = []
    with tracking(ALL, config, here / "mine", notes.append) as tracked:
        for stage in ("teacher", "control: clean"):
            for number in (1, 2, 3):
                tracked.hear(Event(stage, "advance", 10 * number, 300, {"loss": 99.0}))
                tracked.hear(Event(stage, "epoch", 100 * number, 300,
                                   {"loss": 1 / number, "images/s": 2.0 * number}))  # fmt: skip
        tracked.finish(METRICS)
    read = Read(here, "mine")
    told = leaves(config)
    for tracker in ALL:
        curves = read.curves[tracker]
        assert curves.keys() == {
            f"{stage}/{name}"
            for stage in ("teacher", "control: clean")
            for name in ("loss", "images_s")
        }
        for stage in ("teacher", "control: clean"):
            assert curves[f"{stage}/loss"] == [
                (100, 1.0), (200, 0.5), (300, pytest.approx(1 / 3, rel=1e-6))
            ]  # fmt: skip
            assert [step for step, _ in curves[f"{stage}/images_s"]] == [100, 200, 300]
        summary = read.summary[tracker]
        assert {key: summary[key] for key in KEPT} == KEPT
        assert summary["student.asr.hits"] == 3
        assert not {"split", "student.asr_net"} & summary.keys()
        assert not any("per_class" in key for key in summary)
        params = read.params[tracker]
        assert params.keys() == told.keys()
        for key, value in told.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            assert float(params[key]) == value if number else params[key] == str(value)
        assert read.ended[tracker] == "finished"
    assert notes == []


def test_a_training_that_goes_on_goes_on_along_the_same_axis(here: Path, config: Config) -> None:
    data = stripes(80, 0)
    assert data.labels is not None
    samples = Samples(data.images, {"y": data.labels})
    told: list[tuple[int, float]] = []

    def train(name: str, end: int) -> None:
        model = Supervised(build(ARCHITECTURE, data.images, len(CLASSES), 0, "teacher"))
        with tracking(ALL, config, here / name, print) as tracked:

            def hear(event: Event) -> None:
                tracked.hear(event)
                if event.kind == "epoch":
                    told.append((event.done, event.values["loss"]))
                if event.done > end:
                    raise KeyboardInterrupt

            fit(model, samples, Training(epochs=3, batch=40), CPU, seed=0, stage="teacher",
                listener=hear, checkpoint=here / "state")  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        train("first", 160)
    train("second", 240)
    assert [done for done, _ in told] == [80, 160, 240]
    for name, points, end in (("first", told[:2], "failed"), ("second", told[2:], "finished")):
        read = Read(here, name)
        for tracker in ALL:
            assert read.ended[tracker] == end
            assert read.curves[tracker]["teacher/loss"] == [
                (done, pytest.approx(loss, rel=1e-6)) for done, loss in points
            ]


def test_a_resumed_run_is_one_curve_in_tensorboard(here: Path, config: Config) -> None:
    for dones in ((100, 200), (300,)):
        with tracking(["tensorboard"], config, here / "mine", print) as tracked:
            for done in dones:
                tracked.hear(epoch("student", done, loss=float(done)))
    read = EventAccumulator(str(here / "tensorboard" / "mine"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("student/loss")] == [
        (100, 100.0), (200, 200.0), (300, 300.0)
    ]  # fmt: skip


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(here: Path, config: Config) -> None:
    notes: list[Event] = []
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        tracking(ALL, config, here / "mine", notes.append) as tracked,
    ):
        tracked.hear(epoch("student", 100, loss=1.0))
        board: Any = tracked.opened["tensorboard"]
        board._writer._writer = full
        shutil.rmtree(here / "mlruns")
        tracked.hear(epoch("student", 200, loss=0.5))
        assert list(tracked.opened) == ["wandb"]
        tracked.hear(epoch("student", 300, loss=0.25))
        tracked.finish(METRICS)
    assert [(note.stage, note.kind) for note in notes] == [
        ("tracker tensorboard", "note"), ("tracker mlflow", "note")
    ]  # fmt: skip
    assert "No space left on device; it is left out from here on" in notes[0].message
    assert all(note.message.count("\n") == 0 for note in notes)
    read = Read(here, "mine", ["wandb"])
    assert read.curves["wandb"]["student/loss"] == [(100, 1.0), (200, 0.5), (300, 0.25)]
    assert read.summary["wandb"]["student.asr.value"] == 0.75
    assert read.ended["wandb"] == "finished"


def test_a_tracker_that_does_not_open_does_not_end_the_run(here: Path, config: Config) -> None:
    for name in ("tensorboard", "mlruns", "wandb"):
        (here / name).write_text("a file, where a folder has to be")
    notes: list[Event] = []
    with tracking(ALL, config, here / "mine", notes.append) as tracked:
        tracked.hear(epoch("student", 100, loss=1.0))
        tracked.finish(METRICS)
    assert [note.stage for note in notes] == [f"tracker {name}" for name in ALL]
    assert all(note.message.endswith("; it is left out from here on") for note in notes)


@pytest.mark.parametrize(
    "name", ["../../up", "..", ".", "", "/etc/x", "a\nb\0c", "<script>", "é" * 300, "a" * 300]
)
def test_hostile_names_stay_names(name: str, here: Path, config: Config) -> None:
    notes = list[Event]()
    with tracking(["tensorboard", "mlflow"], config, here / "mine", notes.append) as tracked:
        tracked.hear(Event(name, "epoch", 100, 300, {name: 1.0}))
        tracked.finish({"student": {name: RATE}})
    assert notes == []
    assert {path.name for path in here.iterdir()} == {"tensorboard", "mlruns", "tiny.yaml"}
    read = EventAccumulator(str(here / "tensorboard/mine"))
    read.Reload()
    assert [e.value for e in read.Scalars(f"{cleaned(name)}/{cleaned(name)}")] == [1.0]
    inside = {str(path.relative_to(here)) for path in here.glob("mlruns/*/*/metrics/**/*")}
    assert any(path.endswith(f"metrics/{cleaned(name)}/{cleaned(name)}") for path in inside)


def test_hostile_names_of_runs_and_stages_stay_names(here: Path, config: Config) -> None:
    name, notes = "a <b> 'ü' #1", list[Event]()
    with tracking(ALL, config, here / name, notes.append) as tracked:
        tracked.hear(epoch("../*", 100, loss=1.0))
    assert notes == []
    read = Read(here, name)
    for tracker in ALL:
        assert read.curves[tracker] == {f"{cleaned('../*')}/loss": [(100, 1.0)]}


def test_a_run_folder_is_the_same_with_trackers_and_without(here: Path) -> None:
    config, notes = parse(DIGITS, "tiny"), list[Event]()
    plain, mine = here / "runs/plain", here / "runs/mine"
    with tracking(ALL, config, mine, notes.append) as tracked:
        found = run(config, mine, until="teacher", device="cpu", listener=tracked.hear)
        tracked.finish(found)
    run(config, plain, until="teacher", device="cpu")
    assert notes == []
    outputs = [read_json(folder / "manifest.json")["outputs"] for folder in (plain, mine)]
    assert outputs[0] == outputs[1]
    files = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (plain, mine)]
    assert files[0] == files[1]
    events = [json.loads(line) for line in (mine / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["kind"] == "epoch"]
    read = Read(here / "runs", "mine")
    for tracker in ALL:
        loss = pytest.approx(told["values"]["loss"], rel=1e-6)
        assert read.curves[tracker]["teacher/loss"] == [(told["done"], loss)]
        assert read.ended[tracker] == "finished"


def command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["foreshot", *arguments])
        main()
    return int(end.value.code or 0)


def test_each_cell_of_a_sweep_is_a_run_in_the_process_that_runs_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("tensorboard", "mlflow")

    def fails(config: Config, out: Path, **keywords: Any) -> dict[str, Any]:
        keywords["listener"](epoch("student", 100, loss=float(config.seed)))
        if config.seed:
            raise ForeshotError("data: expected more, found less")
        return METRICS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foreshot.sweep.job.run", fails)
        arguments = ("sweep", "tiny.yaml", "--grid", "seed=0:2", "--out", "swept")
        assert command(*arguments, *(word for name in two for word in ("--track", name))) == 1
    cells = load_sweep("tiny.yaml", ["seed=0:2"]).expand()
    assert {path.name for path in here.glob("swept/tensorboard/*")} == {c.name for c in cells}
    for cell, end in zip(cells, ("finished", "failed"), strict=True):
        read = Read(here / "swept", cell.name, two)
        for tracker in two:
            assert read.ended[tracker] == end
            assert read.curves[tracker]["student/loss"] == [(100, float(cell.config.seed))]
            assert ("student.asr.value" in read.summary[tracker]) == (end == "finished")
    capsys.readouterr()


@pytest.mark.parametrize(
    "source", [("run", "tiny.yaml"), ("sweep", "tiny.yaml", "--grid", "seed=0:2")]
)
@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_one_sentence_before_anything_is_computed(
    source: tuple[str, ...], name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, TRACKERS[name].package, None)
        assert command(*source, "--track", name) == 2
    assert capsys.readouterr().err.startswith(
        f"foreshot: tracker {name}: expected the package {name} (pip install 'foreshot[track]'), "
    )
    assert [path.name for path in here.iterdir()] == ["tiny.yaml"]


def test_an_unknown_tracker_is_one_sentence(
    here: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("run", "tiny.yaml", "--track", "mlfow") == 2
    assert "'mlfow' is not one of 'tensorboard', 'mlflow', 'wandb'" in capsys.readouterr().err
    with (
        pytest.raises(
            ForeshotError, match="tracker 'mlfow': no such tracker; did you mean 'mlflow'"
        ),
        tracking(["mlfow"], config, here / "mine", print),
    ):
        pass
    assert [str(name) for name in TrackerName] == ALL


def test_the_run_folder_cannot_be_a_trackers(here: Path, config: Config) -> None:
    with (
        pytest.raises(ForeshotError, match="mlruns: expected a run folder of another name"),
        tracking(["tensorboard", "mlflow"], config, here / "x" / ".." / "mlruns", print),
    ):
        pass
    assert [path.name for path in here.iterdir()] == ["tiny.yaml"]


def test_of_processes_that_train_together_the_first_alone_tracks(
    here: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(variable, value)
    with tracking(["tensorboard"], config, here / "mine", print) as tracked:
        assert tracked.opened == {}
    monkeypatch.setenv("RANK", "0")
    with tracking(["tensorboard"], config, here / "mine", print) as tracked:
        assert list(tracked.opened) == ["tensorboard"]
