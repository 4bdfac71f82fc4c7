import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from foreshot.config import load_config
from foreshot.distillation import LOSSES
from foreshot.errors import ForeshotError

FOLDER = Path(__file__).resolve().parent.parent / "claims"


sys.path.append(str(FOLDER))
measure, methods, table = map(import_module, ("measure", "methods", "table"))


def rate(hits: int) -> dict[str, float | int]:
    return {"value": hits / 1000, "hits": hits, "total": 1000, "low": 0.0, "high": 1.0}


def row(seed: int, asr: int, seconds: float, mib: int) -> dict[str, Any]:
    models = {"clean_accuracy": rate(900), "asr": rate(7)}
    metrics = {
        "schema": 1,
        "teacher": {**models, "sha256_before": "ab"},
        "student": {"clean_accuracy": rate(880), "asr": rate(asr), "asr_net": asr / 1000 - 0.007},
        "controls": {"clean": {"clean_accuracy": rate(885), "asr": rate(7)}},
        "poison": {"count": 50, "rate": 0.05, "linf_255": 16, "psnr_db": None},
    }
    timing = {"wall_seconds": seconds, "cpu_seconds": seconds, "peak_memory_mib": mib}
    return {"seed": seed, "ok": True, **timing, "metrics": metrics}


def claim(rows: list[dict[str, Any]], failed: list[int]) -> dict[str, Any]:
    return {
        "command": "foreshot run signs",
        "device": "cpu",
        "precision": "float32",
        "versions": {"torch": "2.13.0"},
        "source": {"commit": "0123456789abcdef", "dirty": False},
        "host": {"cpu": "X", "cpu_capability": "AVX2", "cores": 4, "threads": 2, "gpu": None},
        "date": "2025-01-02",
        "seeds": [row["seed"] for row in rows] + failed,
        "failed": failed,
        "summary": measure.summary(rows),
    }


@pytest.fixture
def claims() -> dict[str, dict[str, Any]]:
    rows = [row(0, 960, 60, 700), row(1, 970, 90, 900), row(2, 980, 120, 800)]
    return {"b": claim(rows, []), "a": claim(rows[:1], [7])}


def test_summary_is_mean_and_sample_spread_of_the_rates():
    figures = measure.summary([row(0, 960, 60, 700), row(1, 980, 90, 900)])
    assert figures["metrics.student.asr"] == {
        "mean": pytest.approx(0.97),
        "std": pytest.approx(0.02 / 2**0.5),
        "min": 0.96,
        "max": 0.98,
        "n": 2,
    }
    assert figures["metrics.student.asr_net"]["mean"] == pytest.approx(0.963)
    assert "metrics.student.asr.hits" not in figures
    assert not {"seed", "ok", "metrics.schema", "metrics.poison.psnr_db"} & figures.keys()


def test_rows_are_sorted_and_tell_of_spread_and_failures(claims: dict[str, Any]):
    lines = table.render(claims).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    found = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert list(found) == ["`a`", "`b`"]
    assert found["`b`"] == {
        "experiment": "`b`",
        "poison": "5 %, within 16/255",
        "student ASR": "97.0 ± 1.0 (96.0 to 98.0)",
        "clean student ASR": "0.7 ± 0.0 (0.7 to 0.7)",
        "trigger-only student ASR": "-",
        "teacher ASR": "0.7 ± 0.0 (0.7 to 0.7)",
        "accuracy: teacher": "90.0 ± 0.0 (90.0 to 90.0)",
        "student": "88.0 ± 0.0 (88.0 to 88.0)",
        "clean student": "88.5 ± 0.0 (88.5 to 88.5)",
        "minutes": "1.5",
        "peak memory": "900 MiB",
        "seeds": "3",
    }
    assert found["`a`"]["student ASR"] == "96.0"
    assert found["`a`"]["seeds"] == "1 of 2: 1 failed"


def test_notes_name_command_commit_machine_and_date(claims: dict[str, Any]):
    claims["b"]["source"]["dirty"] = True
    first, second = table.render(claims).splitlines()[-2:]
    assert first == (
        "- [`a`](claims/a.json): `foreshot run signs --set seed=N` for N = 0, 7, commit "
        "`0123456789`, X (AVX2), 2 threads on 4 cores, float32, torch 2.13.0, 2025-01-02."
    )
    assert "`0123456789` with local changes" in second


def test_a_claim_of_failures_alone_is_shown():
    (_, _, line, *_) = table.render({"x": claim([], [0, 1])}).splitlines()
    assert line.count("| - ") == 10
    assert line.endswith("| 0 of 2: 2 failed |")


def test_only_what_stands_between_the_markers_is_replaced():
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    fresh = table.insert(text, "new")
    assert fresh == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.insert(fresh, "new") == fresh


@pytest.mark.parametrize("text", ["", "{0}", "{1}{0}", "{0}{0}{1}"])
def test_missing_or_confused_markers_are_an_error(text: str):
    with pytest.raises(ValueError, match="once each"):
        table.insert(text.format(table.BEGIN, table.END), "new")


def test_finished_seeds_are_kept_only_if_nothing_changed(tmp_path: Path):
    same = {"command": "foreshot run signs", "source": {"commit": "a", "dirty": False}}
    out = tmp_path / "claim.json"
    assert measure.kept(out, same) == []
    measure.write_json(out, {**same, "runs": [{"seed": 3}]})
    assert measure.kept(out, same) == [{"seed": 3}]
    assert measure.kept(out, {**same, "command": "foreshot run digits"}) == []
    dirty = {**same, "source": {"commit": "a", "dirty": True}}
    measure.write_json(out, {**dirty, "runs": [{"seed": 3}]})
    assert measure.kept(out, dirty) == []


def weighed(job: str) -> dict[str, Any]:
    if job == "heavy":
        raise RuntimeError("not enough memory")
    return {"student": {"asr": {"value": len(job) / 8}}}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_is_a_row_beside_the_others(
    workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    title = "cell {}".format
    found = dict(measure.outcomes(weighed, ["ab", "heavy", "abcd"], workers, title))
    assert found["heavy"] == {"ok": False, "failed": "not enough memory"}
    assert found["ab"] == weighed("ab")
    assert found["abcd"] == weighed("abcd")
    said = capsys.readouterr().out
    assert "cell ab: ASR 25.0%" in said
    assert "cell heavy: FAILED: not enough memory" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_program_is_no_row(workers: int) -> None:
    with pytest.raises(ForeshotError, match=r"^cell 3: TypeError: .*\n(.*\n)+.*in weighed"):
        list(measure.outcomes(weighed, ["ab", 3], workers, "cell {}".format))


def test_check_fails_on_a_stale_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claims: dict[str, Any]
):
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    docs.mkdir()
    for path in (readme, *(docs / f"{name}.md" for name in ("distillation", "map", "matrix"))):
        path.write_text(f"{table.BEGIN}\n{table.END}\n")
    measure.write_json(tmp_path / "claims" / "b.json", claims["b"])
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["table.py", "--check"])
    before = readme.read_text()
    with pytest.raises(SystemExit, match=r"python claims/table\.py") as caught:
        table.main()
    assert readme.read_text() == before
    assert str(readme.name) in str(caught.value)
    monkeypatch.setattr("sys.argv", ["table.py"])
    table.main()
    assert "97.0 ± 1.0" in readme.read_text()
    monkeypatch.setattr("sys.argv", ["table.py", "--check"])
    table.main()


def test_methods_are_rows_with_their_spread_over_the_seeds(claims: dict[str, Any]) -> None:
    def run(method: str, seed: int, hits: int) -> dict[str, Any]:
        rates = {"clean_accuracy": rate(hits), "asr": rate(hits - 100), "seconds": 1.0}
        ways = {"labels": rates} if method == "alone" else {"labels": rates, "answers": rates}
        return {"method": method, "seed": seed, "teacher": rate(950 + seed), **ways}

    runs = [run("alone", 0, 900), run("kd", 0, 920), run("alone", 1, 910), run("kd", 1, 940)]
    text = table.render_methods({"signs": {**claims["b"], "seeds": [0, 1], "runs": runs}})
    assert "| `alone` | 90.5 ± 0.7 (90.0 to 91.0) | - | - | 2 |" in text
    kd = "93.0 ± 1.4 (92.0 to 94.0)"
    assert f"| `kd` | {kd} | {kd} | 83.0 ± 1.4 (82.0 to 84.0) | 2 |" in text
    assert "teachers: 95.0 ± 0.1 (95.0 to 95.1)" in text
    assert "](../claims/methods/signs.json)" in text
    runs.append({"method": "at", "seed": 0, "teacher": rate(950), "labels": {"failed": "nan"}})
    text = table.render_methods({"signs": {**claims["b"], "seeds": [0, 1], "runs": runs}})
    assert "| `at` | 1 failed | - | - | 1 |" in text
    assert table.render_methods({}) == "Nothing has been measured yet."


@pytest.mark.parametrize("name", methods.METHODS)
def test_each_method_has_a_student_with_labels_and_one_without(name: str) -> None:
    how = methods.configs(load_config("signs"), name)
    labelled, alone = how["labels"].distillation, how["answers"].distillation
    assert labelled.ce_weight == methods.METHODS[name].ce
    assert alone.ce_weight == 0
    own = labelled.terms[-1]
    assert alone.terms[-1] == own
    assert own.loss.on_features == bool(own.at)
    assert (len(alone.terms) == 2) == (own.loss.on_features and name != "simkd")


def test_every_loss_is_measured() -> None:
    assert {method.loss["name"] for method in methods.METHODS.values()} == set(LOSSES)
