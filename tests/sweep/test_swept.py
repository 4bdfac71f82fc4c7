"""Sweeps of real runs: the same bits wherever they run, and every stage once."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import foreshot
from conftest import DIGITS
from foreshot.files import file_digest, read_json
from foreshot.record import RunFolder
from foreshot.sweep import Job, load_sweep
from foreshot.sweep.plan import ordered, steps

SWEEP = """
preset: tiny.yaml
set: [attack.epsilon=32]
grid: {attack.rate: [0.02, 0.05]}
"""


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def no_pictures(*given: Any) -> None:
    """Drawing takes longer than all the rest."""


def go(folder: Path, **options: Any) -> Job:
    """The sweep of the file, in a folder with a store of its own."""
    folder.mkdir()
    (folder / "tiny.yaml").write_text(DIGITS)
    (folder / "sweep.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORESHOT_HOME", str(folder / "home"))
        patch.setattr(RunFolder, "draw", no_pictures)
        sweep = load_sweep(str(folder / "sweep.yaml"))
        job = Job(sweep, folder / "out", threads=1, device="cpu", **options)
        assert job.run() == 0
        return job


def weights(out: Path) -> dict[str, str]:
    """SHA-256 of teachers, poison and students, by cell."""
    return {str(p.relative_to(out)): file_digest(p) for p in sorted(out.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return go(tmp_path_factory.mktemp("real") / "serial")


def test_every_stage_is_computed_once_and_as_often_as_planned(
    swept: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = swept.folder.path.parent / "home"
    monkeypatch.setenv("FORESHOT_HOME", str(home))
    stored = {kind: len(list(home.glob(f"store/{kind}/*"))) for kind in ("teacher", "student")}
    crafted = [read_json(file)["inputs"]["attack"]["name"]
               for file in home.glob("store/poison/*/done.json")]  # fmt: skip
    planned: dict[str, set[str]] = {}
    for cell in swept.cells:
        for kind, key in steps(cell.config):
            planned.setdefault(kind, set()).add(key)
    count = {kind: len(keys) for kind, keys in planned.items()}
    assert count == {
        "teacher": 1, "poison": 2, "student": 2, "control: clean": 1, "evaluation": 2,
    }  # fmt: skip
    assert stored == {"teacher": 1, "student": count["student"] + count["control: clean"]}
    assert crafted.count("pgd") == count["poison"]
    again = swept.plan()
    assert (again.todo, again.seconds) == ([], 0)
    # Everything is there, and known to be: a new cell of the old parts costs its student alone.
    more = replace(swept, sweep=load_sweep(
        str(swept.folder.path.parent / "sweep.yaml"), (), ["distillation.ce_weight=0.5"]
    ))  # fmt: skip
    plan = more.plan()
    kinds = {kind: sum(step in plan.evidence.there for step in uses)
             for kind, uses in plan.uses.items()}  # fmt: skip
    assert kinds == {"teacher": 1, "poison": 2, "student": 0, "control: clean": 0, "evaluation": 0}
    assert plan.seconds is not None
    assert plan.seconds > 0


def test_the_table_holds_the_numbers_of_the_runs(swept: Job) -> None:
    frame = foreshot.results(swept.folder.path)
    assert list(frame["cell"]) == [cell.name for cell in swept.cells]
    assert list(frame["attack.rate"]) == [0.02, 0.05]
    assert list(frame["attack.epsilon"]) == [32, 32]
    for _, row in frame.iterrows():
        folder = Path(row["path"])
        metrics, manifest = (read_json(folder / f"{n}.json") for n in ("metrics", "manifest"))
        for model in ("teacher", "student"):
            for name in ("clean_accuracy", "asr", "robust_accuracy"):
                for key, value in metrics[model][name].items():
                    assert row[f"{model}.{name}.{key}"] == value
        assert row["controls.clean.asr.low"] == metrics["controls"]["clean"]["asr"]["low"]
        assert row["student.asr_net"] == metrics["student"]["asr_net"]
        assert row["poison.count"] == metrics["poison"]["count"]
        assert row["seconds.total"] == metrics["seconds"]["total"]
        assert row["seed"] == 0
        assert row["digest"] == file_digest(folder / "student.safetensors")
        assert row["commit"] == manifest["source"].get("commit")
        assert row["threads"] == 1
        assert row["error"] is None
    assert not [column for column in frame if "per_class" in column]


def test_files_hold_the_same_table(swept: Job) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = rows(swept.folder.path)
    assert lines == swept.folder.rows()
    table = parquet.read_table(swept.folder.path / "results.parquet").to_pylist()
    columns = {key for row in lines for key in row}
    assert table == [{key: row.get(key) for key in table[0]} for row in lines]
    assert set(table[0]) == columns


def kill_it(cell: Path) -> None:
    """Kills the worker as soon as a cell trains its student."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        events = cell / "events.jsonl"
        if events.exists() and '"student", "kind": "start"' in events.read_text():
            (worker,) = active_children()
            worker.kill()
            return
        time.sleep(0.01)


def test_a_process_ends_with_the_same_bits_although_it_is_killed(
    swept: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ordered(swept.cells)[0].name
    killer = Thread(target=kill_it, args=(tmp_path / "apart/out" / first,))
    killer.start()
    job = go(tmp_path / "apart", engine="processes")
    killer.join()
    assert capsys.readouterr().out.count("started ") == 2 + 1
    assert weights(job.folder.path) == weights(swept.folder.path)
    assert len(weights(job.folder.path)) == 2 * 4
    assert {row["threads"] for row in job.folder.rows()} == {1}


@pytest.mark.slow
def test_ray_ends_with_the_same_bits(swept: Job, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    job = go(tmp_path / "apart", engine="ray", workers=2)
    assert weights(job.folder.path) == weights(swept.folder.path)


def finish(job: Job) -> None:
    sys.exit(job.run())


def test_two_sweeps_at_once_compute_every_stage_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: Job
) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(RunFolder, "draw", no_pictures)
    sweep = load_sweep(str(swept.folder.path.parent / "sweep.yaml"), ["attack.rate=0.02"])
    jobs = [Job(sweep, tmp_path / name, threads=1, device="cpu") for name in ("a", "b", "a")]
    children = [get_context("fork").Process(target=finish, args=(job,)) for job in jobs]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a").items() <= weights(swept.folder.path).items()
    started = [event["stage"] for event in heard(tmp_path) if event["kind"] == "start"]
    assert sorted(started) == sorted(["teacher", "poison", "student", "control: clean"])


def heard(folder: Path) -> Iterator[dict[str, Any]]:
    for file in folder.glob("[ab]/*/events.jsonl"):
        yield from map(json.loads, file.read_text().splitlines())
