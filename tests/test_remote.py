"""What one machine has computed is found by another, whole, or is not taken."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import foreshot.store
from conftest import DIGITS
from foreshot.config import parse
from foreshot.errors import ForeshotError
from foreshot.executor import Ray
from foreshot.experiment import run
from foreshot.files import file_digest, read_json, write_json
from foreshot.progress import Event
from foreshot.record import RunFolder
from foreshot.remote import SIGN, Remote, reached
from foreshot.store import DONE, Artefact, Store, home, remote_url
from foreshot.sweep import Job, load_sweep

Told = Callable[[str, str], object]


class Watched(LocalFileSystem):
    """A folder that tells of all that it is asked; the one who is told may raise."""

    cachable = False

    def __init__(self, told: Told = lambda what, path: None) -> None:
        super().__init__()
        self.told = told

    def info(self, path: str, **given: Any) -> Any:
        self.told("info", path)
        return super().info(path, **given)

    def open(self, path: str, *given: Any, **more: Any) -> Any:
        self.told("open", path)
        return super().open(path, *given, **more)

    def put_file(self, path1: str, path2: str, *given: Any, **more: Any) -> None:
        self.told("put", path2)
        super().put_file(path1, path2, *given, **more)


class Machine:
    """A store of its own, with a remote, and a stage that counts how often it is computed."""

    def __init__(self, root: Path, remote: Remote | None) -> None:
        self.notes: list[str] = []
        self.store = Store(root, lambda event: self.notes.append(event.message), remote)
        self.computed = 0

    def compute(self, folder: Path) -> None:
        self.computed += 1
        for name in ("a", "b"):
            (folder / f"{name}.bin").write_bytes(name.encode() * 100)

    def stage(self, **inputs: Any) -> Artefact:
        return self.store.stage("stage", inputs or {"x": 1}, self.compute)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The folder that machines share."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def machine(tmp_path: Path, shared: Path):
    """Machines with an empty store each and one remote."""

    def make(name: str, told: Told = lambda what, path: None) -> Machine:
        url = f"file://{shared}"
        reached(url)
        return Machine(tmp_path / name, Remote(Watched(told), str(shared), url))

    return make


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_one_computes_and_the_other_finds(protocol: str, tmp_path: Path, shared: Path) -> None:
    url = f"{protocol}://{shared}"
    first, second = (Machine(tmp_path / name, reached(url)) for name in "ab")
    made, found = first.stage(), second.stage()
    assert (first.computed, second.computed) == (1, 0)
    assert (first.notes, second.notes) == ([], [f"found in {url}"])
    assert contents(found.folder) == contents(made.folder)
    assert contents(found.folder).keys() == {"a.bin", "b.bin", DONE}
    assert found.folder == tmp_path / "b" / "stage" / made.folder.name
    assert (found.digests, found.seconds) == (made.digests, made.seconds)
    assert not list((tmp_path / "b/work").iterdir())
    assert second.stage() == found
    assert second.notes[1:] == ["found in the store"]
    assert second.stage(x=2).folder.name != made.folder.name
    assert second.computed == 1


def test_what_is_there_is_not_given_again_and_the_marker_comes_last(
    machine, tmp_path: Path
) -> None:
    given: list[str] = []

    def told(what: str, path: str) -> None:
        given.extend([Path(path).name] * (what == "put"))

    first, second = machine("a", told), machine("b", told)
    first.stage()
    assert given == ["a.bin", "b.bin", DONE]
    second.stage()
    first.stage()
    second.stage()
    alone = Machine(tmp_path / "c", None)  # has computed it before it had a remote
    alone.stage()
    machine("c", told).stage()
    assert len(given) == 3


def test_what_was_computed_without_a_remote_is_given_later(machine, tmp_path: Path) -> None:
    Machine(tmp_path / "a", None).stage()
    machine("a").stage()
    second = machine("b")
    second.stage()
    assert second.computed == 0


def killed(work: Callable[[], object]) -> bool:
    """Whether work was killed, in a process of its own."""
    process = get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def kill(moment: str, number: int) -> Told:
    """Kills the process when it asks for something the so-many-th time."""
    asked = 0

    def told(what: str, path: str) -> None:
        nonlocal asked
        asked += what == moment
        if asked == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return told


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_that_is_killed_while_it_gives_leaves_no_artefact(number: int, machine) -> None:
    assert killed(machine("a", kill("put", number)).stage)
    second, third, again = machine("b"), machine("c"), machine("a")
    second.stage()
    assert second.computed == 1
    assert second.notes == []
    again.stage()  # it had it already
    third.stage()
    assert (again.computed, third.computed) == (0, 0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_that_is_killed_while_it_fetches_fetches_again(number: int, machine) -> None:
    made = machine("a").stage()
    assert killed(machine("b", kill("open", number)).stage)
    again = machine("b")
    assert list((again.store.root / "work").iterdir())
    assert contents(again.stage().folder) == contents(made.folder)
    assert again.computed == 0
    assert not list((again.store.root / "work").iterdir())


def test_one_that_is_killed_gives_the_rest_when_it_is_run_again(machine, shared: Path) -> None:
    def stop(what: str, path: str) -> None:
        if what == "put" and path.endswith(DONE):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine("a", stop).stage()
    assert not list(shared.rglob(DONE))
    again = machine("a")
    assert contents(again.stage().folder) == contents(next(shared.glob("stage/*")))
    assert again.computed == 0


def marked(**changes: Any) -> Callable[[Path], None]:
    """Changes what the marker says."""
    return lambda folder: write_json(folder / DONE, read_json(folder / DONE) | changes)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[17] ^= 1
    file.write_bytes(data)


def listed(name: str) -> Callable[[Path], None]:
    """The marker lists one more file, with the digest of what lies where the name leads."""

    def list_it(folder: Path) -> None:
        digests = read_json(folder / DONE)["digests"]
        marked(digests={**digests, name: digests["a.bin"]})(folder)
        if "evil" in name and "\0" not in name:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(folder / "a.bin", folder / name)

    return list_it


NAMES = ("../evil", "sub/evil", "..\\evil", ".evil", "evil\0", "evil\n", "", "..", DONE, "e" * 101)
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda folder: flip(folder / "b.bin"), "b.bin has changed"),
    "missing file": (lambda folder: (folder / "a.bin").unlink(), "a.bin"),
    "truncated marker": (lambda folder: os.truncate(folder / DONE, 30), "char"),
    "empty marker": (lambda folder: os.truncate(folder / DONE, 0), "char 0"),
    "huge marker": (lambda folder: os.truncate(folder / DONE, 2**20 + 1), "done.json: expected 1"),
    "deep marker": (lambda folder: (folder / DONE).write_text("[" * 100_000), "recursion"),
    "huge file": (lambda folder: os.truncate(folder / "b.bin", 1001), "b.bin: expected 900 bytes"),
    "no digests": (marked(digests=None), "NoneType"),
    "digests that are none": (marked(digests=[]), "list"),
    "seconds that are none": (marked(seconds="soon"), "soon"),
    "seconds past all numbers": (marked(seconds=10**400), "int too large"),
}
DAMAGES |= {repr(name)[:9]: (listed(name), "expected a plain file name, found") for name in NAMES}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_there_is_named_computed_and_replaced(
    damage: str, machine, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreshot.store, "LARGEST", 1000)
    first, second, third = (machine(name) for name in "abc")
    right = contents(first.stage().folder)
    (there,) = shared.glob("stage/*")
    do, why = DAMAGES[damage]
    do(there)
    made = second.stage()
    assert second.computed == 1
    (note,) = second.notes
    assert note.startswith(f"file://{shared}/stage/{there.name} is damaged (")
    assert note.endswith("); it is computed again")
    assert why in note
    assert note.isprintable()
    assert contents(made.folder).keys() == right.keys()
    assert not list((tmp_path / "b").rglob("*evil*"))
    assert not list((tmp_path / "b/work").iterdir())
    found = third.stage()
    assert third.computed == 0
    assert contents(found.folder) | {DONE: b""} == right | {DONE: b""}


def test_a_mixture_of_two_uploads_is_noticed(machine, shared: Path) -> None:
    """The one is killed while it writes other bits of the same stage over the other's."""

    def stops(what: str, path: str) -> None:
        if what == "put" and path.endswith("b.bin"):
            raise KeyboardInterrupt

    def otherwise(folder: Path) -> None:
        for name in ("a.bin", "b.bin"):
            (folder / name).write_text("c")

    def meets(what: str, path: str) -> None:
        if what == "put" and path.endswith(DONE):
            other = machine("b", stops)
            other.compute = otherwise
            with pytest.raises(KeyboardInterrupt):
                other.stage()

    made = machine("a", meets).stage()
    assert next(shared.glob("stage/*/a.bin")).read_text() == "c"
    third = machine("c")
    assert third.stage().digests == made.digests
    assert third.computed == 1
    assert "a.bin has changed" in third.notes[0]


def test_a_remote_that_goes_is_noted_once_and_left_alone(machine, shared: Path) -> None:
    asked: list[str] = []

    def told(what: str, path: str) -> None:
        asked.append(path)
        if down:
            raise TimeoutError("no\x1b answer")

    down, first = False, machine("a", told)
    first.stage(x=0)
    down = True
    before = len(asked)
    for x in (1, 2, 0):
        first.stage(x=x)
    assert first.computed == 3
    assert len(asked) == before + 1
    said = f"file://{shared} is lost (no\\x1b answer); the run goes on without it"
    assert first.notes == [said, "found in the store"]


@pytest.mark.parametrize("moment", ["open", "put"])
def test_a_remote_that_goes_in_the_middle_costs_nothing_else(moment: str, machine) -> None:
    machine("a").stage()

    def told(what: str, path: str) -> None:
        if what == moment and path.endswith("b.bin"):
            raise ConnectionResetError("gone")

    second = machine("b", told)
    right = {"a.bin": b"a" * 100, "b.bin": b"b" * 100, DONE: b""}
    for x in (1, 2):  # the one is fetched, the other is given
        assert contents(second.stage(x=x).folder) | {DONE: b""} == right
    assert len([note for note in second.notes if " is lost (gone)" in note]) == 1
    assert not list((second.store.root / "work").iterdir())


def test_nothing_is_written_where_a_share_was_mounted(machine, shared: Path) -> None:
    first = machine("a")
    shutil.rmtree(shared)
    shared.mkdir()
    first.stage()
    assert first.notes == [f"file://{shared} is lost ({SIGN} is gone); the run goes on without it"]
    assert not list(shared.iterdir())


def test_a_full_disk_here_is_no_fault_of_the_remote(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("a").stage()
    second = machine("b")

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left on device") as caught:
        second.stage()
    assert Path(caught.value.filename).name == DONE
    assert (second.notes, second.computed) == ([], 0)
    monkeypatch.undo()
    second.stage()
    assert second.computed == 0


# How a user says it ------------------------------------------------------------------------------

BAD: dict[str, str] = {
    "nonsense://x": "Protocol not known: nonsense",
    "nowhere://x": "Install nowhere to go there",
    "s3:/bucket": "no protocol",
    "/shared": "no protocol",
    "file:///there/is/nothing": "No such file or directory",
    "ftp://user:secret@127.0.0.1:1/x": "Connection refused",
}


@pytest.mark.parametrize("url", BAD)
def test_a_remote_that_cannot_be_reached_is_a_sentence(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation(
        "nowhere", "foreshot_nowhere.System", clobber=True, errtxt="Install nowhere to go there"
    )
    monkeypatch.setenv("FORESHOT_REMOTE", url)
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    with pytest.raises(ForeshotError) as caught:
        run(parse(DIGITS, "tiny"), tmp_path / "out", device="cpu")
    said = str(caught.value)
    assert said.startswith("FORESHOT_REMOTE: expected the URL of a folder that can be read and ")
    assert BAD[url] in said
    assert url.replace("user:secret@", "") in said
    assert "secret" not in said
    assert not (tmp_path / "home").exists()
    sweep = load_sweep(str(write(tmp_path / "tiny.yaml", DIGITS)), ["seed=0,1"])
    with pytest.raises(ForeshotError, match="^FORESHOT_REMOTE: "):
        Job(sweep, tmp_path / "sweep", threads=1, device="cpu").run()
    assert not (tmp_path / "sweep").exists()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_environment_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path))
    monkeypatch.delenv("FORESHOT_REMOTE", raising=False)
    assert (remote_url(), Store.open().remote) == ("", None)
    monkeypatch.setenv("FORESHOT_REMOTE", f"memory://{tmp_path}")
    store = Store.open()
    assert store.remote is reached(f"memory://{tmp_path}")
    assert store.root == home() / "store"
    assert Store.open(root=tmp_path / "x").root == tmp_path / "x"


def test_ray_tells_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path))
    monkeypatch.setenv("FORESHOT_REMOTE", "memory://x")
    told: dict[str, Any] = {}

    def init(**given: Any) -> None:
        told.update(given)
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ForeshotError, match="executor ray"):
        next(Ray(1).map(abs, [1], lambda number: None))
    said = {"FORESHOT_HOME": str(tmp_path), "FORESHOT_REMOTE": "memory://x"}
    assert told["runtime_env"]["env_vars"] == said


# Runs --------------------------------------------------------------------------------------------


def began(folder: Path) -> list[str]:
    """The stages that runs in a folder have computed."""
    lines = [line for file in folder.rglob("events.jsonl") for line in file.open()]
    return [event["stage"] for event in map(json.loads, lines) if event["kind"] == "start"]


def artefacts(root: Path) -> dict[str, str]:
    """What does not depend on the clock, of a store or a run folder."""
    clock = (DONE, "metrics.json", "manifest.json", "events.jsonl", "report.html")
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in clock)
    return {str(path.relative_to(root)): file_digest(path) for path in files}


def nothing(*given: Any) -> None:
    """Drawing takes longer than all the rest."""


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "draw", nothing)
    monkeypatch.setattr("foreshot.experiment.write_page", nothing)


def test_a_run_finds_all_of_it_elsewhere_bit_for_bit(
    tmp_path: Path, shared: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(DIGITS, "tiny")

    def go(name: str, listener: Callable[[Event], None] = lambda event: None) -> dict[str, Any]:
        monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / name / "home"))
        return run(config, tmp_path / name / "out", device="cpu", listener=listener)

    monkeypatch.setenv("FORESHOT_REMOTE", f"file://{shared}")
    made, found = go("a"), go("b")
    assert "teacher" in began(tmp_path / "a")
    assert began(tmp_path / "b") == []
    assert found == made
    for part in ("out", "home/store"):
        assert artefacts(tmp_path / "b" / part) == artefacts(tmp_path / "a" / part) != {}

    monkeypatch.setenv("FORESHOT_REMOTE", f"memory://{tmp_path}")

    def goes(event: Event) -> None:
        if (event.stage, event.kind) == ("poison", "start"):
            monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", fail)

    alone = go("c", goes)
    assert alone | {"seconds": 0} == made | {"seconds": 0}
    assert artefacts(tmp_path / "c/home/store") == artefacts(tmp_path / "a/home/store")
    events = (tmp_path / "c/out/events.jsonl").read_text()
    assert events.count("is lost (down); the run goes on without it") == 1


def fail(*given: Any, **more: Any) -> None:
    raise OSError("down")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sweeps_on_two_machines_share_a_remote(
    workers: int, tmp_path: Path, shared: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOT_REMOTE", f"file://{shared}")
    sweep = load_sweep(str(write(tmp_path / "tiny.yaml", DIGITS)), ["attack.rate=0.02,0.05"])

    def go(name: str, workers: int = 1) -> None:
        monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / name / "home"))
        out = tmp_path / name / "out"
        assert Job(sweep, out, threads=1, device="cpu", workers=workers).run() == 0

    at_once = [get_context("fork").Process(target=go, args=(name,)) for name in "ab"]
    for process in at_once:
        process.start()
    for process in at_once:
        process.join(120)
    assert [process.exitcode for process in at_once] == [0, 0]
    assert "teacher" in began(tmp_path / "a") + began(tmp_path / "b")
    go("c", workers)  # several are processes of their own
    assert began(tmp_path / "c") == []
    for name in "bc":
        assert artefacts(tmp_path / name / "home/store") == artefacts(tmp_path / "a/home/store")
