"""What a sweep runs, skips and tries again, what it refuses, and its table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faked import Fake, call, fake, place

import foreshot
from foreshot.errors import ForeshotError
from foreshot.files import read_json, write_json
from foreshot.sweep import Job, load_sweep


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("grid: {seed: 1:3}", "grid.seed: expected a list of values, or text such as '0:3' in quo"),
        ("grid: {seed: []}", "grid.seed: expected a list of values"),
        ("grid: {seed: '3:1'}", "grid.seed: expected a range that goes up, such as 0:3"),
        ("grid: {seed: '0:99999999999'}", "grid.seed: expected a range that goes up"),
        ("grid: [seed]", "bad.yaml: grid: input should be a valid dictionary"),
        ("grid: {seed: '[1'}", "grid.seed: expected YAML"),
        ("grids: {}\nset: []", "bad.yaml: grids: no such key; did you mean 'grid'?"),
        ("set: [seed]\ngrid: {target: [0]}", "--set seed: expected KEY=VALUE"),
        ("preset: gone.yaml\ngrid: {seed: [0]}", "gone.yaml: expected a preset or a YAML file"),
        ("set: [seed=1]", "sweep: expected a grid or cells, found neither"),
        ("preset: signs\ngrid: {sed: [0]}", "signs: sed: no such key; did you mean 'seed'?"),
        ("preset: signs\ngrid: {attack.rate: [0.1, 7]}", "signs: attack.rate: input should be l"),
        ("grid: {seed: '0:200', target: '0:100'}", "sweep: expected at most 10,000 cells, found"),
        ("grid: {seed: !!python/name:os.system ''}", "bad.yaml: expected YAML"),
    ],
)  # fmt: skip
def test_a_bad_sweep_is_one_sentence_and_nothing_starts(
    text: str, sentence: str, place: Path, fake: Fake, call
) -> None:
    (place / "bad.yaml").write_text(text)
    code, out, err = call("bad.yaml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert sentence in err
    assert fake.ran == []
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--executor", "serial", "--workers", "2"), "executor serial: expected 1 worker, found 2"),
        (("--gpus-per-run", "1"), "expected --executor ray, found none"),
        (("--executor", "ray", "--device", "cuda"), "expected --gpus-per-run above 0"),
        (("--grid", "seed"), "--grid seed: expected KEY=VALUES, such as seed=0:3"),
        (("--grid", "seed="), "--grid seed=: expected values between commas, found none"),
        (("--out", "tiny.yaml"), "tiny.yaml: expected a folder for the sweep, found a file"),
        (("--out", "."), ".: expected a sweep's folder or an empty one, found one with other fil"),
    ],
)  # fmt: skip
def test_a_bad_option_is_one_sentence(arguments: tuple[str, ...], sentence: str, call) -> None:
    code, _, err = call("tiny.yaml", "--grid", "seed=0:2", *arguments)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_a_cell_without_its_page_is_not_done(fake: Fake, call) -> None:
    """It is written last: of a run that was killed before, it would never be."""
    arguments = ("tiny.yaml", "--grid", "seed=0:2", "--out", "swept")
    assert call(*arguments)[0] == 0
    (page,) = Path("swept").glob("seed-1-*/report.html")
    page.unlink()
    fake.ran.clear()
    assert call(*arguments)[0] == 0
    assert [config.seed for config in fake.ran] == [1]
    assert page.exists()


@pytest.mark.parametrize("state", [[], {}, {"number": 0}, {"settings": {}}, {"number": "x"}])
def test_an_odd_note_of_a_cell_is_named(state: Any, fake: Fake, call) -> None:
    arguments = ("tiny.yaml", "--grid", "seed=0:1", "--out", "swept")
    assert call(*arguments)[0] == 0
    (note,) = Path("swept/cells").glob("*.json")
    write_json(note, state)
    code, _, err = call(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{note}: expected the number and settings of a cell" in err
    note.unlink()
    assert call(*arguments)[0] == 0


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(fake: Fake, call) -> None:
    fake.failing = lambda config: {
        1: ForeshotError("data: expected more, found less"),
        2: ZeroDivisionError("by\nnothing"),
    }.get(config.seed)
    arguments = ("tiny.yaml", "--grid", "seed=0:4", "--out", "swept")
    code, out, err = call(*arguments)
    assert (code, err) == (1, "")
    assert [config.seed for config in fake.ran] == [0, 1, 2, 3]
    assert "data: expected more, found less (1 of 4 done, 0 running, 1 failed, " in out
    assert out.count("ZeroDivisionError: by nothing") == 2
    states = {row["seed"]: row for row in rows(Path("swept"))}
    assert [states[seed]["state"] for seed in range(4)] == ["done", "failed", "failed", "done"]
    assert states[1]["error"] == "data: expected more, found less"
    trace = read_json(next(Path("swept/cells").glob("seed-2-*.json")))["trace"]
    assert trace.endswith("ZeroDivisionError: by\nnothing\n")

    fake.failing = lambda config: ForeshotError("again") if config.seed == 2 else None
    fake.ran.clear()
    code, out, _ = call(*arguments, "--no-retry")
    assert (code, fake.ran) == (1, [])
    code, out, _ = call(*arguments)
    assert code == 1
    assert [config.seed for config in fake.ran] == [1, 2]
    assert [row["error"] for row in rows(Path("swept"))] == [None, None, "again", None]

    fake.failing = lambda config: None
    assert call(*arguments)[0] == 0
    assert all(row["error"] is None and row["state"] == "done" for row in rows(Path("swept")))
    assert "trace" not in read_json(next(Path("swept/cells").glob("seed-2-*.json")))
    fake.ran.clear()
    assert call(*arguments)[0] == 0
    assert fake.ran == []
    # More cells in the same folder: the table keeps those that were there.
    assert call("tiny.yaml", "--grid", "seed=3:6", "--out", "swept")[0] == 0
    assert [config.seed for config in fake.ran] == [4, 5]
    assert [row["seed"] for row in rows(Path("swept"))] == [0, 1, 2, 3, 4, 5]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_an_interruption_is_130_and_the_next_call_goes_on(fake: Fake, call) -> None:
    fake.failing = lambda config: KeyboardInterrupt() if config.seed == 1 else None  # type: ignore
    arguments = ("tiny.yaml", "--grid", "seed=0:3", "--out", "swept")
    code, _, err = call(*arguments)
    assert code == 130
    assert err == "\nInterrupted. Run the same command again to go on.\n"
    assert [row["state"] for row in rows(Path("swept"))] == ["done", "open", "open"]
    fake.failing = lambda config: None
    assert call(*arguments)[0] == 0
    assert [config.seed for config in fake.ran] == [0, 1, 1, 2]


def test_a_sweep_has_its_folder_by_its_cells(fake: Fake, call) -> None:
    folders = []
    for grid in ("seed=0:2", "seed=0,1", "seed=0:3"):
        code, out, _ = call("tiny.yaml", "--grid", grid)
        assert code == 0
        folders.append(out.splitlines()[-1].removeprefix("Sweep folder: "))
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].startswith("runs/sweep-tiny-")


def test_threads_are_divided_and_given_back(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from foreshot.sweep.job import perform

    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for here, workers, asked, expected in [(8, 3, None, 2), (2, 4, None, 1), (8, 2, 7, 7)]:
        threads[:] = [here]
        job = Job(load_sweep("tiny.yaml", ["seed=0:2"]), workers=workers, threads=asked)
        task = job.tasks(job.cells)[0]
        assert task.threads == expected
        perform(replace(task, out=task.out.with_name(str(here + workers))))
        assert threads == [here, expected, here]


def test_values_of_several_types_are_text_in_the_table(fake: Fake, call) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    grid = "student.training.lr=0.1,'0.2'"
    assert call("tiny.yaml", "--grid", grid, "--grid", "seed=0:2", "--out", "a")[0] == 0
    table = parquet.read_table("a/results.parquet").to_pydict()
    assert table["student.training.lr"] == ["0.1", "0.1", "0.2", "0.2"]
    assert table["seed"] == [0, 1, 0, 1]


def test_what_is_no_sweep_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(ForeshotError, match="expected a sweep's folder, found none"):
        foreshot.results(tmp_path)
