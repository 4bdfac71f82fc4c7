"""claims/map.py, and the tables and plots that are made of what it writes."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from torch import Tensor

from conftest import Rule
from foreshot.attacks import PerturbationOnly, Pgd
from foreshot.compute import CPU, compute
from foreshot.config import Config
from foreshot.data import ImageSet
from foreshot.errors import ForeshotError
from foreshot.experiment import run as run_experiment
from foreshot.files import read_json
from foreshot.poison import Poison
from foreshot.progress import silent
from foreshot.store import Store
from foreshot.triggers import Blend, Patch
from foreshot.triggers.base import stamp_uint8
from test_claims import claim, rate, table

map_, plots = import_module("map"), import_module("plots")
CELLS = [(axis, cell) for axis, cells in map_.AXES.items() for cell in cells]


def test_each_cell_is_an_experiment_that_no_other_cell_is() -> None:
    owned = [map_.config_of(cell, 3) for axis in map_.AXES for cell in map_.owned(axis).values()]
    assert all(config.seed == 3 for config in owned)
    assert len({config.model_dump_json() for config in owned}) == len(owned)
    assert 60 <= len(owned) <= 110  # of several axes; a product of axes would be hundreds


@pytest.mark.parametrize(("axis", "cell"), CELLS, ids=" ".join)
def test_a_cell_is_what_its_name_says(axis: str, cell: str) -> None:
    config: Config = map_.config_of(map_.AXES[axis][cell], 0)
    tree = config.model_dump(mode="json")
    numbers = {
        "rate": config.attack.rate,
        "epsilon": config.attack.epsilon,
        "temperature": tree["distillation"]["terms"][0]["loss"].get("temperature"),
        "epochs": config.student.training.epochs,
        "size": tree["data"].get("train"),
        "target": config.target,
    }
    assert numbers.keys() >= plots.NUMBERS.keys()
    if axis in numbers:
        assert numbers[axis] == float(cell)
    names = {
        "crafting": config.attack.name,
        "placement": f"{config.attack.name}, {config.attack.trigger}",
        "method": config.distillation.terms[-1].loss.name,
        "architecture": f"{config.teacher.model.name} to {config.student.model.name}",
        "method-student": f"{config.distillation.terms[-1].loss.name} to "
        f"{config.student.model.name}",
    }
    if axis in names:
        assert names[axis] == cell
    if axis == "steps":
        attack = config.attack.model_dump()
        direction = {"gradient": "steps", "sign": "signs"}[attack["direction"]]
        assert cell == f"{attack['steps']} {direction} of {attack['step']:g}"
    if axis in ("trigger", "data"):
        assert cell.startswith((config.trigger.name, config.data.name))


def test_a_cell_is_measured_on_its_first_axis_alone() -> None:
    assert map_.owned("centre") == {"centre": ()}
    assert all(map_.owned(axis).keys() < map_.AXES[axis].keys() for axis in ("rate", "epsilon"))
    assert "pgd, inside" not in map_.owned("placement")
    assert "pgd, before" in map_.owned("placement")
    assert "kd to resnet" not in map_.owned("method-student")


def images(levels: list[int]) -> ImageSet:
    """Grey images of 6 x 6, each of one level."""
    plain = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 6, 6)
    return ImageSet(plain.clone(), None, ("a", "b"))


def reads(y: int, x: int, level: int) -> Rule:
    """Says class 1 of images of that level at that pixel."""

    def logits(x_: Tensor) -> Tensor:
        hit = ((255 * x_[:, 0, y, x]).round() == level).float()
        return torch.stack([1 - hit, hit], 1)

    return Rule(logits)


def shares(found: dict[str, Any]) -> dict[str, float]:
    return {part: rate["value"] for part, rate in found.items()}


def test_a_student_is_found_to_read_the_trigger_or_the_perturbation() -> None:
    transfer, trigger = images([50, 100, 150, 200]), Patch(size=2)
    stored = stamp_uint8(trigger, transfer.images[1:3])
    stored[:, :, 0, 0] += 16  # 116 and 166
    stored[:, :, 4, 4] -= 16  # under the trigger, which covers rows and columns 3 and 4
    poison = Poison(torch.tensor([1, 2]), stored)
    models = {
        "perturbation": reads(0, 0, 116),
        "trigger": reads(3, 3, 255),
        "both": reads(4, 4, 239),
        "neither": reads(4, 4, 100),
    }
    found = map_.carriers(models, poison, transfer, trigger, 1, Pgd(trigger="before"), CPU)
    assert shares(found["perturbation"]) == {"stored": 0.5, "perturbation": 0.5, "trigger": 0}
    assert shares(found["trigger"]) == {"stored": 1, "perturbation": 0, "trigger": 1}
    assert shares(found["both"]) == {"stored": 1, "perturbation": 0, "trigger": 0}
    assert shares(found["neither"]) == {"stored": 0, "perturbation": 0.5, "trigger": 0}
    assert found["both"]["stored"]["total"] == 2


def test_the_perturbation_is_taken_off_a_stamped_image_and_put_on_the_plain_one() -> None:
    transfer, trigger = images([100, 250]), Blend(opacity=0.5)
    black = trigger.picture(transfer.shape)[0] == 0
    y, x = (int(axis) for axis in black.nonzero()[0])
    stored = stamp_uint8(trigger, transfer.images)
    assert stored[:, 0, y, x].tolist() == [50, 125]
    stored[:, :, y, x] += 9
    models = {"109": reads(y, x, 109), "255": reads(y, x, 255)}  # 250 + 9 is no level
    poison = Poison(torch.tensor([0, 1]), stored)
    found = map_.carriers(models, poison, transfer, trigger, 1, Pgd(), CPU)
    assert [found[name]["perturbation"]["hits"] for name in models] == [1, 1]


def test_poison_without_a_trigger_is_the_perturbation() -> None:
    transfer, trigger = images([100]), Patch(size=2)
    stored = transfer.images + 7
    poison = Poison(torch.tensor([0]), stored)
    found = map_.carriers(
        {"m": reads(3, 3, 107)}, poison, transfer, trigger, 1, PerturbationOnly(), CPU
    )
    assert shares(found["m"]) == {"stored": 1, "perturbation": 1, "trigger": 0}


QUICK = (
    "teacher.training.epochs=1",
    "student.training.epochs=2",
    "controls=[clean]",
    "attack.steps=2",
    "attack.retries=0",
)


def test_a_cell_is_what_foreshot_run_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_, "PRESET", "digits")
    config = map_.config_of(QUICK, 1)
    engine = compute("cpu")  # bfloat16, where a CPU is made for it
    row = map_.measure(config, Store(tmp_path / "store"), engine, each_epoch=True)
    told = run_experiment(
        config, tmp_path / "run", listener=silent, store=tmp_path / "store", device="cpu"
    )
    for mine, theirs in (
        (row["student"], told["student"]),
        (row["clean"], told["controls"]["clean"]),
        (row["teacher"], told["teacher"]),
    ):
        for key in ("asr", "clean_accuracy", "robust_accuracy"):
            assert mine[key] == theirs[key]
    assert row["poison"] == told["poison"]
    assert row["asr_net"] == told["student"]["asr_net"]
    assert len(row["epochs"]) == 2
    assert row["epochs"][-1]["clean_accuracy"] == row["student"]["clean_accuracy"]
    assert row["epochs"][0] != row["epochs"][-1]
    assert min(row["seconds"].values()) > 0
    json.dumps(row)


SAME = {"schema": 1, "code": "abc"}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """The (rate, seed) of the cells that were measured; a rate of 0.5 fails."""
    calls: list[tuple[float, int]] = []

    def stand_in(config: Config, *_: Any) -> dict[str, Any]:
        calls.append((config.attack.rate, config.seed))
        if config.attack.rate == 0.5:
            raise ForeshotError("attack.rate: expected less")
        return {"student": {"asr": {"value": config.attack.rate}}}

    monkeypatch.setattr(map_, "measure", stand_in)
    monkeypatch.setattr(map_, "FOLDER", tmp_path)
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path))
    axes = {"centre": {"centre": ()}, "rate": {"5": (), "1": ("attack.rate=0.01",)}}
    axes["rate"]["50"] = ("attack.rate=0.5",)
    monkeypatch.setattr(map_, "AXES", axes)
    return calls


def test_what_is_there_is_not_measured_again(
    tmp_path: Path, measured: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    map_.fill("rate", [0], SAME, "cpu", 1)
    assert measured == [(0.01, 0), (0.5, 0)]
    map_.fill("rate", [0, 1], SAME, "cpu", 1)
    assert measured[2:] == [(0.01, 1), (0.5, 1)]
    held = read_json(tmp_path / "rate.json")
    assert [(run["cell"], run["seed"], run["ok"]) for run in held["runs"]] == [
        ("1", 0, True),
        ("50", 0, False),
        ("1", 1, True),
        ("50", 1, False),
    ]
    assert held["runs"][1]["failed"] == "attack.rate: expected less"
    assert held["runs"][2]["command"] == "foreshot run signs --set attack.rate=0.01 --set seed=1"
    assert held["cells"] == {"5": [], "1": ["attack.rate=0.01"], "50": ["attack.rate=0.5"]}

    monkeypatch.setitem(map_.AXES["rate"], "1", ("attack.rate=0.02",))  # another cell by that name
    map_.fill("rate", [1], SAME, "cpu", 1)
    assert measured[4:] == [(0.02, 1)]
    with pytest.raises(ForeshotError, match="also with seeds 0, which would be lost"):
        map_.fill("rate", [1], {**SAME, "code": "other"}, "cpu", 1)
    map_.fill("rate", [0, 1], {**SAME, "code": "other"}, "cpu", 1)
    assert measured[5:] == [(0.02, 0), (0.5, 0), (0.02, 1), (0.5, 1)]
    assert len(read_json(tmp_path / "rate.json")["runs"]) == 4


def test_the_plan_counts_what_is_shared_once(measured: list[tuple[float, int]]) -> None:
    folder = Path(__file__).resolve().parent.parent / "claims"
    (map_.FOLDER.parent / "signs.json").write_bytes((folder / "signs.json").read_bytes())
    figures = read_json(folder / "signs.json")["summary"]
    teacher, poison, student, last = (
        figures[f"metrics.seconds.{stage}"]["mean"]
        for stage in ("teacher", "poison", "distill", "evaluate")
    )
    seconds = 2 * (teacher + poison + 2 * student + last)  # the centre, and its clean student
    seconds += 2 * 2 * (poison + student + last)
    assert f"about {seconds / 60:.0f} minutes on" in map_.plan(["centre", "rate"], [0, 1], SAME)
    map_.fill("rate", [0, 1], SAME, "cpu", 1)
    assert "3 cells, 0 runs left" not in map_.plan(["rate"], [0, 1], SAME)
    assert "2 cells, 0 runs left, about 0 minutes" in map_.plan(["rate"], [0, 1], SAME)


def ran(cell: str, seed: int, hits: int) -> dict[str, Any]:
    return {
        "cell": cell,
        "seed": seed,
        "ok": True,
        "student": {"asr": rate(hits), "clean_accuracy": rate(900)},
        "clean": {"asr": rate(10), "clean_accuracy": rate(910)},
        "teacher": {"asr": rate(5), "clean_accuracy": rate(940)},
        "asr_net": (hits - 10) / 1000,
        "poison": {"psnr_db": 30.0 + seed},
        "carriers": {"student": {"perturbation": rate(1000 - hits)}},
        "epochs": [{"asr": rate(at), "clean_accuracy": rate(900)} for at in (hits // 2, hits)],
    }


@pytest.fixture
def found() -> dict[str, Any]:
    about = claim([], [])
    low = ["attack.rate=0.01"]
    pair = ["student.model.name=vgg"]
    failed = {"cell": "0.01", "seed": 2, "ok": False, "failed": "no"}
    parts: dict[str, Any] = {
        "rate": ({"0.01": low, "0.05": []}, [ran("0.01", 0, 200), ran("0.01", 1, 400), failed]),
        "centre": ({"centre": []}, [ran("centre", seed, 900 + 20 * seed) for seed in range(3)]),
        "epochs": ({"1": ["student.training.epochs=1"], "8": []}, [ran("1", 0, 100)]),
        "architecture": ({"resnet to resnet": [], "resnet to vgg": pair}, []),
    }
    order = ("centre", "rate", "epochs", "architecture")
    return {
        axis: {**about, "place": order.index(axis), "cells": cells, "runs": runs}
        for axis, (cells, runs) in parts.items()
    }


def test_tables_tell_of_every_cell_in_the_maps_order(found: dict[str, Any]) -> None:
    lines = table.render_map(found).splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert headings == ["### Centre", "### Rate", "### Epochs", "### Architecture"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    (here,) = (
        dict(zip(head, row, strict=True))
        for head, row in zip(rows, rows[2:], strict=False)
        if row[0] == "0.01"
    )
    assert here == {
        "rate": "0.01",
        "ASR": "30.0 ± 14.1 (20.0 to 40.0)",
        "net ASR": "29.0 ± 14.1 (19.0 to 39.0)",
        "accuracy": "90.0 ± 0.0 (90.0 to 90.0)",
        "clean student's accuracy": "91.0 ± 0.0 (91.0 to 91.0)",
        "teacher ASR": "0.5 ± 0.0 (0.5 to 0.5)",
        "perturbation alone": "70.0 ± 14.1 (60.0 to 80.0)",
        "PSNR": "30.5 dB",
        "seeds": "2 of 3: 1 failed",
        "set": "`attack.rate=0.01`",
    }
    centre = [row[1:] for row in rows if row[-1] == "the centre"]
    assert centre == [centre[0]] * 4  # one cell on four axes
    assert [row[1:9] for row in rows if row[0] == "resnet to vgg"] == [["-"] * 7 + ["0"]]
    assert table.render_map({}) == "Nothing has been measured yet."


def test_curves_go_through_the_means_and_bars_to_the_seeds(found: dict[str, Any]) -> None:
    draw, shown = plots.plots(plots.resolved(found))["rate"]
    axes = Figure().subplots()
    draw(axes, shown)
    lines = [line for line in axes.containers if isinstance(line, ErrorbarContainer)]
    student = next(line for line in lines if line.get_label() == "student")
    curve, _, (bars,) = student.lines
    assert np.asarray(curve.get_xydata()) == pytest.approx(np.array([[0.01, 30], [0.05, 92]]))
    ends = [bar[:, 1].tolist() for bar in bars.get_segments()]
    assert ends == [pytest.approx([20, 40]), pytest.approx([90, 94])]
    assert axes.get_xscale() == "log"


def test_plots_are_drawn_once_and_told_from_those_of_other_runs(
    tmp_path: Path, found: dict[str, Any]
) -> None:
    cells = plots.resolved(found)
    assert not plots.up_to_date(tmp_path, cells, check=True)
    assert not list(tmp_path.iterdir())
    assert plots.up_to_date(tmp_path, cells, check=False)
    drawn = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn.keys() == {"rate", "epochs", "along", "architecture", "carriers"}
    assert b"failed" not in drawn["architecture"]
    assert b"not measured" in drawn["architecture"]
    links = [f"](map/{name}.svg)" in table.render_map(found) for name in drawn]
    assert all(links)
    assert plots.up_to_date(tmp_path, cells, check=True)
    (tmp_path / "rate.svg").unlink()
    assert plots.up_to_date(tmp_path, cells, check=False)
    assert (tmp_path / "rate.svg").read_bytes() == drawn["rate"]
    found["epochs"]["runs"][0]["student"]["asr"] = rate(101)
    assert not plots.up_to_date(tmp_path, plots.resolved(found), check=True)
