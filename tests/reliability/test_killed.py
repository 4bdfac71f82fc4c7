"""A run that is killed, wherever that is, goes on and ends with the same bits."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from processes import Before, Place, after, at_byte, at_change, counted, ended

from foreshot.files import file_digest, read_json
from foreshot.progress import Event
from foreshot.record import load_run
from foreshot.store import Store

SEED = 20
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


@dataclass(frozen=True)
class Undisturbed:
    """A run to its end: its artefacts, its seconds, and what it does to the file system."""

    artefacts: dict[str, Any]
    seconds: float
    changes: int


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    counting = Place(tmp_path_factory.mktemp("counting"))
    log = counting.root / "log"
    assert counting.run(before=counted(log)) == 0
    # A second run for its time: the first brings files into memory, and counts.
    place, began = Place(tmp_path_factory.mktemp("undisturbed")), time.monotonic()
    assert place.run() == 0
    seconds = time.monotonic() - began
    assert place.artefacts() == counting.artefacts()
    return Undisturbed(place.artefacts(), seconds, int(log.read_text()))


def check(place: Place, undisturbed: Undisturbed) -> None:
    """What is found, in the run folder and in the store, is what an undisturbed run leaves."""
    assert place.run() == 0
    assert place.said == ""
    assert place.artefacts() == undisturbed.artefacts
    assert not list(place.root.rglob("*.part"))
    assert not list((place.home / "store/work").iterdir())
    load_run(place.out)
    before = (place.out / "events.jsonl").read_text()
    assert place.run() == 0
    new = (place.out / "events.jsonl").read_text().removeprefix(before)
    assert '"message": "found in the store"' in new
    assert '"start"' not in new
    assert "damaged" not in new


def kill(place: Place, kind: str, chance: random.Random, undisturbed: Undisturbed) -> int:
    """Starts a run and kills it at a random moment, unless it ends before; its exit code."""
    if kind == "time":
        return after(chance.uniform(0, undisturbed.seconds), place.start())
    if kind == "change":
        return place.run(before=at_change(chance.randint(1, undisturbed.changes)))
    return place.run(before=at_byte(int(10 ** chance.uniform(0, 4.9))))


def test_a_run_is_killed_five_times(undisturbed: Undisturbed, tmp_path: Path) -> None:
    place, chance = Place(tmp_path), random.Random(SEED)
    kinds = ("change", "byte", "time", "change", "byte")
    codes = [kill(place, kind, chance, undisturbed) for kind in kinds]
    assert all(code in (0, *KILLED) for code in codes)
    assert codes[0] in KILLED  # how far the others get before their moment depends on the machine
    check(place, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["time", "change", "byte"])
def test_a_run_is_killed_at_thirty_random_moments(
    kind: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    chance, killed, number = random.Random(f"{SEED} {kind}"), 0, 0
    while killed < 10:  # some end before their moment, as others' work makes a machine slow or fast
        place, number = Place(tmp_path / str(number)), number + 1
        killed += kill(place, kind, chance, undisturbed) in KILLED
        check(place, undisturbed)
        shutil.rmtree(place.root)
        assert number < 40


SWEEP = ("--grid", "attack.epsilon=16,32", "--grid", "seed=0:2", "--threads", "1")


def cells(place: Place) -> dict[str, Any]:
    """What a sweep leaves whose bits must not depend on how it came about."""
    found: dict[str, Any] = {}
    for path in sorted(place.out.rglob("*.safetensors")):
        found[str(path.relative_to(place.out))] = file_digest(path)
    for path in sorted(place.out.glob("*/metrics.json")):
        found[path.parent.name] = read_json(path) | {"seconds": None}
    return found


@pytest.mark.slow
def test_a_sweep_is_killed_at_thirty_random_moments(tmp_path: Path) -> None:
    def sweep(place: Place, **keywords: Any) -> int:
        return place.run(*SWEEP, command="sweep", **keywords)

    undisturbed, chance = Place(tmp_path / "undisturbed"), random.Random(SEED)
    log = tmp_path / "log"
    assert sweep(undisturbed, before=counted(log)) == 0
    expected, changes = cells(undisturbed), int(log.read_text())
    assert len(list(undisturbed.out.glob("*/manifest.json"))) == 4
    for number in range(30):
        place = Place(tmp_path / str(number))
        code = sweep(place, before=at_change(chance.randint(1, changes)))
        assert code in KILLED
        assert sweep(place) == 0
        assert cells(place) == expected
        assert not list((place.home / "store/work").iterdir())
        rows = (place.out / "results.jsonl").read_text().splitlines()
        assert [json.loads(row)["state"] for row in rows] == ["done"] * 4
        shutil.rmtree(place.root)


@pytest.mark.slow
def test_a_run_is_killed_at_every_boundary_of_a_stage(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Each time it goes on, it is killed at the next start, milestone or end of a stage."""
    place, killed = Place(tmp_path), 0
    while (code := place.run(before=at_event)) in KILLED:
        killed += 1
    assert code == 0
    assert killed >= 20
    check(place, undisturbed)


def at_event() -> None:
    """Killed at the first event that no killed run has got to yet."""
    import foreshot.progress

    seen, real = Path("seen"), foreshot.progress.plain
    there = seen.read_text().splitlines() if seen.exists() else []

    def listen(event: Event) -> None:
        name = f"{event.stage} {event.kind} {event.done}"
        if event.kind in ("start", "epoch", "end") and name not in there:
            seen.write_text("\n".join([*there, name]))
            os.kill(os.getpid(), signal.SIGKILL)
        real(event)

    foreshot.progress.plain = listen


# A stage of the store, at every change that it makes ----------------------------------------------


def compute(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f".{name}").write_text("a checkpoint")
        (folder / name).write_text(name * 100)


def stage(root: Path) -> None:
    Store(root / "store").stage("stage", {"x": 1}, compute)


def forked(work: Callable[[], object]) -> int:
    process = get_context("fork").Process(target=work)
    process.start()
    return ended(process)


def inside(root: Path, before: Before) -> Callable[[], None]:
    def work() -> None:
        os.chdir(root)
        before()
        stage(root)

    return work


def every_fsync(number: int) -> Before:
    def patch() -> None:
        count, real = 0, os.fsync

        def fsync(handle: int) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fsync

    return patch


@pytest.mark.parametrize("moment", [at_change, every_fsync])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_stage_is_killed_at_every_change_that_it_makes(
    moment: Callable[[int], Before], damaged: bool, tmp_path: Path
) -> None:
    stage(tmp_path / "whole")
    (whole,) = (tmp_path / "whole/store/stage").iterdir()
    number = 0
    for number in range(1, 100):
        root = tmp_path / str(number)
        root.mkdir()
        if damaged:
            stage(root)
            (root / "store/stage" / whole.name / "a").write_text("changed")
        code = forked(inside(root, moment(number)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        heard: list[Event] = []
        store = Store(root / "store", heard.append)
        found = store.stage("stage", {"x": 1}, compute)
        assert sorted(found.digests) == ["a", "b"]
        assert sorted(path.name for path in found.folder.iterdir()) == ["a", "b", "done.json"]
        assert not list((root / "store/work").iterdir())
        heard.clear()
        assert store.stage("stage", {"x": 1}, compute).digest == found.digest
        assert [event.message for event in heard] == ["found in the store"]
    assert number > (3 if moment is every_fsync else 10)
