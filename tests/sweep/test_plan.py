"""What cells share, in what order they start, and what they cost."""

import json
from pathlib import Path

import pytest
from faked import Fake, call, fake, place

from foreshot.config import load_config
from foreshot.files import read_json, write_json
from foreshot.sweep import Job, load_sweep
from foreshot.sweep.board import duration, last_stage
from foreshot.sweep.plan import ordered, steps


@pytest.mark.parametrize(
    ("setting", "shared"),
    [
        ("attack.rate=0.1", {"teacher", "control: clean"}),
        ("trigger.name=dot", {"teacher", "control: clean"}),
        ("target=4", {"teacher", "control: clean"}),
        ("attack.name=fgsm", {"teacher", "control: clean"}),
        ("surrogate={}", {"teacher", "control: clean"}),
        ("surrogate={data: disjoint}", set()),
        ("student.training.epochs=3", {"teacher", "poison"}),
        ("compression.name=quantize", {"teacher", "poison"}),
        ("distillation.views=cached", {"teacher", "poison"}),
        ("controls=[clean, noise]", {"teacher", "poison", "student", "control: clean"}),
        ("defender.clean=100", {"teacher", "poison", "student", "control: clean", "evaluation"}),
        ("defence.name=combined", {"teacher"}),
        ("teacher.training.epochs=3", set()),
        ("data={name: signs}", set()),
        ("validation=0.2", set()),
        ("seed=1", set()),
    ],
)
def test_cells_share_the_stages_that_a_setting_does_not_reach(
    setting: str, shared: set[str], place: Path
) -> None:
    one, other = (dict(steps(load_config("tiny.yaml", more))) for more in ((), (setting,)))
    assert {kind for kind, key in one.items() if other.get(kind) == key} == shared


def test_a_seed_apart_steps_are_alike(place: Path) -> None:
    first, second = (load_config("tiny.yaml", [f"seed={seed}"]) for seed in (0, 1))
    assert steps(first, seed=False) == steps(second, seed=False)


def test_neighbours_share_as_little_as_can_be(place: Path) -> None:
    grid = ["seed=0:2", "attack.rate=0.1,0.2", "student.training.epochs=1:3"]
    cells = ordered(load_sweep("tiny.yaml", grid).expand())
    configs = [cell.config for cell in cells]
    assert [(c.seed, c.attack.rate, c.student.training.epochs) for c in configs] == [
        (0, 0.1, 1), (1, 0.1, 1), (0, 0.2, 1), (1, 0.2, 1),
        (0, 0.1, 2), (1, 0.1, 2), (0, 0.2, 2), (1, 0.2, 2),
    ]  # fmt: skip


def test_the_cost_is_unknown_until_something_like_it_has_finished(fake: Fake, call) -> None:
    grid = ("tiny.yaml", "--grid", "attack.rate=0.02,0.05", "--grid", "seed=0:2", "--out", "runs/a")
    code, out, _ = call(*grid, "--dry-run")
    assert code == 0
    assert fake.ran == []
    assert not Path("runs").exists()
    assert "4 cells to run, 0 not; cost unknown: no run like these has finished here" in out
    table = {line.split("│")[1].strip(): line.split("│")[2:5] for line in out.splitlines()
             if line.startswith("│")}  # fmt: skip
    counts = {kind: [int(part) for part in table[kind]] for kind in ("teacher", "poison")}
    assert counts == {"teacher": [4, 2, 0], "poison": [4, 4, 0]}
    assert [int(part) for part in table["control: clean"]] == [4, 2, 0]

    # A run beside it, of seed 0: this store has nothing of it, but it tells how long things take.
    fake(load_config("tiny.yaml"), Path("runs/one"))
    plan = Job(
        load_sweep("tiny.yaml", ["attack.rate=0.02,0.05", "seed=0:2"]), Path("runs/a")
    ).plan()
    # Two teachers, four times poison, student and evaluation, two clean students.
    assert plan.seconds == 2 * 100 + 4 * (10 + 30 + 1) + 2 * 32
    job = Job(load_sweep("tiny.yaml", ["seed=0:2"]), Path("runs/a"), threads=3)
    assert job.plan().seconds is None  # that run had one thread

    # Its teacher and clean student are in the store: they cost nothing more.
    for number, name in enumerate(("teacher", "controls/clean")):
        manifest = read_json(Path("runs/one/manifest.json"))
        manifest["outputs"][f"{name}.safetensors"] = str(number) * 64
        write_json(Path("runs/one/manifest.json"), manifest)
        write_json(Path(f"home/store/x/{number}/done.json"), {"digests": {"m": str(number) * 64}})
    plan = Job(
        load_sweep("tiny.yaml", ["attack.rate=0.02,0.05", "seed=0:2"]), Path("runs/a")
    ).plan()
    assert plan.seconds == 100 + 4 * (10 + 30 + 1) + 32
    assert "4 cells to run, 0 not; about 5 min of one worker's time" in call(*grid, "--dry-run")[1]

    assert call(*grid)[0] == 0
    code, out, _ = call(*grid, "--dry-run")
    assert "0 cells to run, 4 not; about 0 s of one worker's time" in out
    assert len(fake.ran) == 5


def test_a_damaged_run_is_no_evidence(fake: Fake, place: Path) -> None:
    sweep = load_sweep("tiny.yaml", ["seed=0:2"])
    for name in ("config.yaml", "metrics.json", "manifest.json"):
        fake(load_config("tiny.yaml"), Path("runs") / name)
        (Path("runs") / name / name).write_text("{")
    odd = {"manifest.json": ([1], "x", {}, {"outputs": 1}), "metrics.json": ({"seconds": {}}, [])}
    for name, contents in odd.items():
        for number, content in enumerate(contents):
            fake(load_config("tiny.yaml"), Path("runs") / f"{number}, {name}")
            write_json(Path("runs") / f"{number}, {name}" / name, content)
    (place / "home/store/x/y").mkdir(parents=True)
    (place / "home/store/x/y/done.json").write_text("[")
    assert Job(sweep, Path("runs/a")).plan().seconds is None


def test_times_are_said_as_people_say_them() -> None:
    assert [duration(s) for s in (7, 89.4, 100, 3600, 7200)] == [
        "7 s", "89 s", "2 min", "60 min", "2.0 h",
    ]  # fmt: skip


def test_the_last_stage_of_a_run_is_read_from_its_events(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    assert last_stage(events) == ""
    lines = [json.dumps({"stage": name, "message": "x" * 3000}) for name in ("teacher", "student")]
    events.write_text("\n".join(lines) + "\n")
    assert last_stage(events) == "student"
    events.write_text("half a li")
    assert last_stage(events) == ""
