"""What a sweep is of: grids, files, and each config once."""

import os
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from faked import place
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshot.config import load_config
from foreshot.errors import ForeshotError
from foreshot.sweep import Cell, Sweep, load_sweep
from foreshot.sweep.definition import values

NUMBER = st.integers(-50, 50)
ITEM = st.one_of(
    NUMBER.map(lambda n: (str(n), [n])),
    st.tuples(NUMBER, st.integers(1, 5)).map(
        lambda pair: (f"{pair[0]}:{sum(pair)}", list(range(pair[0], sum(pair))))
    ),
    st.sampled_from([
        ("null", [None]), ("pgd", ["pgd"]), ("0.01", [0.01]), ("{a: 1, b: [2, 3]}",
        [{"a": 1, "b": [2, 3]}]), ("'1:3'", ["1:3"]), ("true", [True]),
    ]),
)  # fmt: skip


@given(st.lists(ITEM, min_size=1, max_size=6), st.sampled_from([",", ", ", " ,"]))
def test_values_stand_between_commas(items: list[tuple[str, list[Any]]], comma: str) -> None:
    text = comma.join(text for text, _ in items)
    assert values(text, "here") == [value for _, found in items for value in found]


@given(st.text(max_size=20))
def test_any_text_is_values_or_a_sentence(text: str) -> None:
    try:
        assert len(values(text, "here")) > 0
    except ForeshotError as error:
        assert str(error).startswith("here: expected")


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([None, "combined", "stamp_tracks"]), min_size=1, unique=True),
)
def test_a_grid_is_crossed(rates: list[float], seeds: list[int], defences: list[Any]) -> None:
    grid = {
        "attack.rate": rates,
        "seed": seeds,
        "defence.name": [d for d in defences if d in NAMES],
    }
    grid = {key: row for key, row in grid.items() if row}
    cells = Sweep(preset="digits", grid=grid).expand()
    assert len(cells) == prod(len(row) for row in grid.values())
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.values["attack.rate"] == cell.config.attack.rate
        assert cell.values["seed"] == cell.config.seed
        defence = cell.config.defence
        if "defence.name" in grid:
            assert cell.values["defence.name"] == (defence and defence.name)
        assert cell.config == load_config("digits", cell.settings)
        assert Path(cell.name).name == cell.name
    assert {cell.config.attack.rate for cell in cells} == set(rates)


NAMES = (None, "combined")


def test_families_are_swept_by_name() -> None:
    sweep = load_sweep(
        "signs", ["attack.name=pgd,fgsm,counterfactual", "defence.name=null,combined"]
    )
    found = [
        (cell.config.attack.name, cell.config.defence and cell.config.defence.name)
        for cell in sweep.expand()
    ]
    attacks = ("pgd", "fgsm", "counterfactual")
    assert found == [(attack, defence) for attack in attacks for defence in NAMES]
    names = [cell.name.rpartition("-")[0] for cell in sweep.expand()]
    assert names[:2] == ["attack-pgd_defence-null", "attack-pgd_defence-combined"]


def test_a_file_says_what_to_sweep(place: Path) -> None:
    sweep = load_sweep("sweep.yaml")
    temperatures = "distillation.terms.0.loss.temperature"
    assert [cell.values for cell in sweep.expand()] == [
        {"attack.epsilon": 32, temperatures: 1, "attack.rate": 0.02},
        {"attack.epsilon": 32, temperatures: 1, "attack.rate": 0.05},
        {"attack.epsilon": 32, temperatures: 4, "student.training.lr": 0.1, "attack.rate": 0.02},
        {"attack.epsilon": 32, temperatures: 4, "student.training.lr": 0.1, "attack.rate": 0.05},
    ]
    more = load_sweep("sweep.yaml", ["attack.rate=0.1", "seed=0:3"], ["attack.epsilon=8"]).expand()
    assert len(more) == 6
    assert {cell.config.attack.epsilon for cell in more} == {8}
    assert {cell.config.attack.rate for cell in more} == {0.1}
    # The preset is looked for beside the sweep's file, wherever one stands.
    os.chdir("/")
    assert load_sweep(str(place / "sweep.yaml")).expand()[0] == sweep_cell(place, sweep)


def sweep_cell(place: Path, sweep: Sweep) -> Cell:
    return sweep.model_copy(update={"preset": str(place / "tiny.yaml")}).expand()[0]


def test_a_sweep_is_yaml_all_the_way(place: Path) -> None:
    text = yaml.safe_dump(load_sweep("sweep.yaml").model_dump(mode="json"))
    (place / "again.yaml").write_text(text)
    assert load_sweep("again.yaml").expand() == load_sweep("sweep.yaml").expand()


def test_the_same_config_is_one_cell() -> None:
    cells = load_sweep("digits", ["attack.rate=0.02,2.0e-2,0.020", "seed=0,0"]).expand()
    assert len(cells) == 1
