"""claims/defences.py, and the tables that are made of what it writes."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from foreshot.compute import compute
from foreshot.config import Config
from foreshot.defences import Combined
from foreshot.experiment import run as run_experiment
from foreshot.files import read_json
from foreshot.store import Store
from test_claims import rate

defences, matrix = import_module("defences"), import_module("matrix")


@pytest.mark.parametrize("preset", defences.SETTINGS)
def test_a_cell_is_what_its_names_say(preset: str) -> None:
    attacks, rows = list(defences.ATTACKS), list(defences.ROWS)
    for number in range(max(len(attacks), len(rows))):  # each of them at least once
        attack, defence = attacks[number % len(attacks)], rows[number % len(rows)]
        config = defences.config_of(preset, attack, defence, 3)
        name, _, rule = defence.partition(", ")
        expected = defences.WITHOUT if defence == defences.UNDEFENDED else name
        assert config.defender.level == (0.2 if rule == "level 0.2" else None)
        assert config.defender.drop == (0.05 if rule.endswith("drop 0.05") else 0.02)
        if isinstance(config.defence, Combined):
            has = any(screen.name == "detector" for screen in config.defence.screens)
            assert has != rule.startswith("without detector")
        assert (config.defence.name, config.seed) == (expected, 3)
        assert config.attack.rate == (0.01 if "1 %" in attack else 0.05)
        if attack in ("fgsm", "pgd", "cw"):
            assert config.attack.name == attack
        # Enough for a screen to remove anything; for a repair 1 % of the set itself.
        if config.defence.kind == "repair":
            assert config.defender.clean <= 100
        else:
            assert 1 / (config.defender.clean / 2 + 1) <= config.defender.drop / 10


def test_a_cell_is_what_foreshot_run_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = [f"{who}.training.epochs=1" for who in ("teacher", "student")]
    settings = (*quick, "controls=[]", "defender.clean=300")
    monkeypatch.setitem(defences.SETTINGS, "digits", {"": settings})
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    store, engine = Store(tmp_path / "home" / "store"), compute("cpu")
    for defence in ("consistency", "disagreement", "none"):
        config = defences.config_of("digits", "pgd", defence, 0)
        found = defences.measure(config, store, engine, defence)
        metrics = run_experiment(config, tmp_path / defence, device="cpu")
        for key in ("clean_accuracy", "asr"):
            assert found["student"][key] == metrics["student"][key]
        if defence == "consistency":
            assert found["screen"].items() <= metrics["defence"].items()
        elif defence == "disagreement":
            assert found["monitor"].items() <= metrics["defence"].items()
        else:
            assert not found.keys() & {"monitor", "screen"}


def test_the_cost_is_what_such_cells_took() -> None:
    runs = [
        {"defence": defence, "seconds": seconds}
        for defence, seconds in (("combined", 100), ("combined", 200), ("clp", 30))
    ] + [{"defence": "clp", "failed": "for a reason"}]
    cells = [("pgd", "combined", 0), ("pgd", "combined", 1), ("fgsm", "clp", 0), ("pgd", "nad", 0)]
    told = defences.cost(cells, runs)
    assert told == "4 cells, about 7 minutes"  # 150 s twice, 30 s, and 110 s as a mean of all
    assert defences.cost(cells, []) == "4 cells; none is measured yet that would tell how long"


def test_cells_that_are_not_asked_for_stay_and_those_of_other_source_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defences, "FOLDER", tmp_path)
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    asked: list[str] = []

    def measure(config: Config, *_: object) -> dict[str, Any]:
        asked.append(f"{config.attack.name} {config.seed}")
        return {"student": {"asr": rate(10)}, "seconds": 1.0}

    def fill(attacks: list[str], seeds: list[int]) -> list[str]:
        asked.clear()
        defences.fill("signs", attacks, ["none"], seeds, "cpu", 1)
        return list(asked)

    monkeypatch.setattr(defences, "measure", measure)
    assert fill(["pgd"], [0, 1]) == ["pgd 0", "pgd 1"]
    assert fill(["pgd", "fgsm"], [0, 1]) == ["fgsm 0", "fgsm 1"]
    before = read_json(tmp_path / "signs.json")
    monkeypatch.setattr(defences, "source_digest", lambda *_: "another")
    assert fill(["pgd"], [1]) == ["pgd 1"]
    after = read_json(tmp_path / "signs.json")
    assert len(before["measured"]) == 1
    assert len(after["measured"]) == 2
    codes = {
        (run["attack"], run["seed"]): after["measured"][run["measured"]]["code"] == "another"
        for run in after["runs"]
    }
    assert codes == {("pgd", 0): False, ("pgd", 1): True, ("fgsm", 0): False, ("fgsm", 1): False}
    assert fill(["pgd"], [1]) == []


def test_the_ranking_compares_with_the_undefended_student_of_the_same_set() -> None:
    def run(attack: str, defence: str, accuracy: int, asr: int, **more: Any) -> dict[str, Any]:
        student = {"clean_accuracy": rate(accuracy), "asr": rate(asr)}
        about = {"attack": attack, "defence": defence, "seed": 0, "ok": True, "seconds": 1.0}
        return about | {"student": student} | more

    runs = [
        run("none", "none", 900, 0),
        run("pgd", "none", 890, 800),
        run("adaptive: both", "none", 880, 700),
        run("none", "mild", 880, 0),
        run("pgd", "mild", 870, 10),
        run("adaptive: both", "mild", 890, 500),
        run("pgd", "mended", 800, 100, undefended={"clean_accuracy": rate(830)}),
        run("adaptive: both", "mended", 850, 700, undefended={"clean_accuracy": rate(860)}),
        run("fgsm", "none", 890, 0),
        run("fgsm", "of one attack", 890, 0),
    ]
    table = matrix.ranking(runs).splitlines()[2:]
    assert table == [
        "| `mild` | 25.5 | 50.0 | +0.5 | +2.0 |",
        "| `mended` | 40.0 | 70.0 | +2.0 | +3.0 |",
        "| `none` | 75.0 | 70.0 | +0.0 | +0.0 |",
    ]
    assert matrix.shared(runs) == "`pgd` (seed 0), `adaptive: both` (seed 0)"
    students = matrix.table(runs, matrix.asr).splitlines()
    assert students[0] == "| defence | none | pgd | adaptive: both | fgsm | seconds |"
    assert students[3] == "| `mild` | 0.0 (88.0) | 1.0 (87.0) | 50.0 (89.0) |  | 1.0 |"
