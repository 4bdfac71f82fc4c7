"""The store computes a stage once, and never hands out what is not whole."""

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshot.errors import ForeshotError
from foreshot.files import file_digest, replacing, write_json
from foreshot.progress import Event
from foreshot.store import DONE, Artefact, Store, content_hash, home, source_digest

Stage = Callable[..., Artefact]


class Bench:
    """A store with a stage that counts how often it is computed."""

    def __init__(self, root: Path) -> None:
        self.heard: list[Event] = []
        self.store = Store(root, self.heard.append)
        self.computed = 0

    def compute(self, folder: Path) -> None:
        self.computed += 1
        (folder / "a.bin").write_bytes(b"alpha" * 100)
        (folder / "b.bin").write_bytes(b"beta")

    def stage(self, **inputs: Any) -> Artefact:
        return self.store.stage("stage", inputs, self.compute)

    @property
    def notes(self) -> list[str]:
        return [event.message for event in self.heard if event.kind == "note"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


def test_the_second_call_computes_nothing(bench: Bench) -> None:
    first, second = bench.stage(x=1), bench.stage(x=1)
    assert bench.computed == 1
    assert (first.folder, first.digests, first.seconds) == (
        second.folder,
        second.digests,
        second.seconds,
    )
    assert first.digest == second.digest
    assert bench.notes == ["found in the store"]
    assert set(first.digests) == {"a.bin", "b.bin"}
    assert first.digests["b.bin"] == file_digest(first.folder / "b.bin")
    assert not list((bench.store.root / "work").iterdir())


def test_other_inputs_or_another_stage_are_computed_beside(bench: Bench) -> None:
    folders = {bench.stage(x=x).folder for x in (1, 2, "1", [1], None)}
    folders.add(bench.store.stage("other", {"x": 1}, bench.compute).folder)
    assert len(folders) == 6 == bench.computed
    assert bench.stage(x=1, y=2).folder == bench.stage(y=2, x=1).folder


def damage_content(folder: Path) -> None:
    data = bytearray((folder / "a.bin").read_bytes())
    data[17] ^= 1
    (folder / "a.bin").write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / DONE).write_bytes((folder / DONE).read_bytes()[:-20])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": damage_content,
    "missing file": lambda folder: (folder / "b.bin").unlink(),
    "truncated marker": truncate,
    "no marker": lambda folder: (folder / DONE).unlink(),
    "empty marker": lambda folder: (folder / DONE).write_bytes(b""),
    "binary marker": lambda folder: (folder / DONE).write_bytes(b"\xff\xfe\x00"),
    "marker of another kind": lambda folder: write_json(folder / DONE, [1, 2]),
    "marker without digests": lambda folder: write_json(folder / DONE, {"seconds": 1}),
    "marker with odd digests": lambda folder: write_json(
        folder / DONE, {"digests": [], "seconds": 1}
    ),
    "a folder for a file": lambda folder: (
        (folder / "b.bin").unlink(),
        (folder / "b.bin").mkdir(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_reported_and_computed_again(damage: str, bench: Bench) -> None:
    first = bench.stage(x=1)
    DAMAGES[damage](first.folder)
    second = bench.stage(x=1)
    assert bench.computed == 2
    assert len(bench.notes) == 1
    assert bench.notes[0].startswith(f"{first.folder} is damaged (")
    assert bench.notes[0].endswith("; it is computed again")
    assert second.digests == first.digests
    assert file_digest(second.folder / "a.bin") == first.digests["a.bin"]


def test_a_failed_computation_leaves_its_checkpoint_and_goes_on(bench: Bench) -> None:
    def dies(folder: Path) -> None:
        (folder / ".checkpoint").write_text("half way")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.store.stage("stage", {"x": 1}, dies)
    assert not (bench.store.root / "stage").exists()

    def goes_on(folder: Path) -> None:
        assert (folder / ".checkpoint").read_text() == "half way"
        (folder / "result").write_text("done")

    artefact = bench.store.stage("stage", {"x": 1}, goes_on)
    assert sorted(path.name for path in artefact.folder.iterdir()) == [DONE, "result"]
    assert set(artefact.digests) == {"result"}


def test_the_record_names_the_inputs(bench: Bench) -> None:
    artefact = bench.stage(x=1, y=["a"])
    record = json.loads((artefact.folder / DONE).read_text())
    assert record["inputs"] == {"x": 1, "y": ["a"]}
    assert record["digests"] == artefact.digests
    assert artefact.folder.name == content_hash({"stage": "stage", "x": 1, "y": ["a"]})


def use(root: Path, dies: bool) -> None:
    """What each of several processes does."""

    def compute(folder: Path) -> None:
        with (root / "computed").open("a") as log:
            log.write("once\n")
        if dies:
            (folder / ".half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        (folder / "result").write_text("same")

    artefact = Store(root / "store").stage("slow", {"x": 1}, compute)
    assert (artefact.folder / "result").read_text() == "same"


def start(root: Path, dies: bool = False) -> BaseProcess:
    process = get_context("fork").Process(target=use, args=(root, dies))
    process.start()
    return process


def test_processes_at_once_compute_once(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "computed").read_text() == "once\n"


def test_a_process_that_dies_releases_the_lock(tmp_path: Path) -> None:
    for dies, code in ((True, -signal.SIGKILL), (False, 0)):
        process = start(tmp_path, dies)
        process.join(60)
        assert process.exitcode == code
    assert (tmp_path / "computed").read_text() == "once\nonce\n"


words = st.text("abé", max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
@settings(deadline=None, max_examples=60)
def test_equal_values_have_equal_hashes(value: Any) -> None:
    copy = json.loads(json.dumps(value))
    assert content_hash(copy) == content_hash(value)
    assert content_hash([value]) != content_hash(value)
    assert len(content_hash(value)) == 32


def test_the_source_digest_is_of_the_parts_named() -> None:
    assert source_digest("attacks") != source_digest("triggers")
    assert source_digest("attacks", "triggers") == source_digest("triggers", "attacks")
    assert source_digest("seeding.py") != source_digest("poison.py")
    for missing in ("nonsense", "nonsense.py"):
        with pytest.raises(ForeshotError, match=f"{missing}: expected a part of foreshot's source"):
            source_digest("attacks", missing)


def test_home_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("FORESHOT_HOME", "")
    monkeypatch.setenv("HOME", "/someone")
    assert home() == Path("/someone/.cache/foreshot")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with replacing(target) as part:
        part.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as part:
        part.write_text("ne")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["file"]
