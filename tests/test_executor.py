"""Where work runs: the same outcomes everywhere, and a death is one item's own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from secrets import token_hex

import pytest

from foreshot.errors import ForeshotError
from foreshot.executor import Executor, Failure, Processes, Ray, Serial


def square(number: int) -> int:
    return number * number


def odd(what: str | int) -> str:
    if what == "sentence":
        raise ForeshotError("the key: expected this, found that")
    if what == "error":
        raise ZeroDivisionError("by nothing")
    return str(what)


def die(marks: Path) -> str:
    """Dies as often as there is a mark to take away."""
    marks.mkdir(exist_ok=True)
    for mark in marks.iterdir():
        mark.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return marks.name


def meet(places: tuple[Path, Path]) -> bool:
    """Comes to one place and waits until somebody is at the other."""
    mine, other = places
    mine.touch()
    end = time.monotonic() + 60
    while not other.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return other.exists()


def gpu_of_two(places: tuple[Path, Path]) -> str | None:
    """The GPU that is seen, while somebody else is there."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") if meet(places) else "alone"


def linger(places: tuple[Path, Path]) -> None:
    """Comes to its place, and never leaves; unless it is the second, and the first is there."""
    mine, _ = places
    beside = mine.with_suffix(".part")
    beside.write_text(str(os.getpid()))
    beside.rename(mine)  # whoever sees it finds all of it
    if mine.name == "second":
        meet(places)
    else:
        time.sleep(600)


RAY = pytest.param("ray", marks=pytest.mark.slow)
EVERYWHERE = pytest.mark.parametrize("executor", ["serial", "processes", RAY], indirect=True)
APART = pytest.mark.parametrize("executor", ["processes", RAY], indirect=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of two cores, whose workers can import this file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(sys.executable).with_name("ray")
    size = "--num-cpus=2 --num-gpus=1 --include-dashboard=false --disable-usage-stats"
    with pytest.MonkeyPatch.context() as patch:
        # Ray reads these when it is imported.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", token_hex(32))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        pytest.importorskip("ray")
        command = [script, "start", "--head", "--block", f"--port={port}", *size.split()]
        head = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert head.stdout is not None
        assert any(b"Ray runtime started" in line for line in head.stdout)
        yield f"127.0.0.1:{port}"
        head.terminate()
        head.communicate()


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "ray":
        return Ray(2, address=request.getfixturevalue("cluster"))
    return {"serial": Serial(), "processes": Processes(2)}[request.param]


def outcomes(executor: Executor, work, items: list) -> list:
    """What came of the items, in their order."""
    began: list[int] = []
    found = dict(executor.map(work, items, began.append))
    # In order, but for what is tried again.
    assert list(dict.fromkeys(began)) == list(range(len(items)))
    return [found[number] for number in range(len(items))]


@EVERYWHERE
def test_every_item_has_its_outcome(executor: Executor) -> None:
    assert outcomes(executor, square, [3, 1, 4, 1, 5]) == [9, 1, 16, 1, 25]
    assert outcomes(executor, square, []) == []


@EVERYWHERE
def test_an_error_concerns_its_item_alone(executor: Executor) -> None:
    one, sentence, error, last = outcomes(executor, odd, [1, "sentence", "error", 2])
    assert (one, last) == ("1", "2")
    assert sentence == Failure("the key: expected this, found that")
    assert error.reason == "ZeroDivisionError: by nothing"
    assert 'raise ZeroDivisionError("by nothing")' in error.trace


@APART
def test_a_death_is_tried_again_once(executor: Executor, tmp_path: Path) -> None:
    deaths = {"never": 0, "once": 1, "always": 2, "late": 0}
    for name, count in deaths.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / str(number)).touch()
    never, once, always, late = outcomes(executor, die, [tmp_path / name for name in deaths])
    assert (never, once, late) == ("never", "once", "late")
    assert isinstance(always, Failure)
    if isinstance(executor, Processes):
        assert always.reason == "its process was killed by signal 9, 2 times"
    else:
        assert always.reason.startswith("its process was lost: ")
    assert not list((tmp_path / "always").iterdir())


def test_the_death_of_a_worker_that_waits_costs_the_next_item_no_try(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    (second / "mark").touch()  # it dies once itself
    outcomes = Processes(1).map(die, [first, second], lambda number: None)
    assert next(outcomes) == (0, "first")
    [child] = active_children()
    child.kill()
    child.join()
    assert list(outcomes) == [(1, "second")]


@APART
def test_items_run_side_by_side(executor: Executor, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert outcomes(executor, meet, [(a, b), (b, a)]) == [True, True]


@pytest.mark.slow
def test_items_share_a_gpu_by_fractions(cluster: str, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    halves = Ray(2, gpus=0.5, address=cluster)
    assert outcomes(halves, gpu_of_two, [(a, b), (b, a)]) == ["0", "0"]


def test_here_one_runs_after_the_other(tmp_path: Path) -> None:
    heard: list[str] = []
    for number, result in Serial().map(square, [1, 2], lambda number: heard.append(f"+{number}")):
        heard.append(f"-{number}={result}")
    assert heard == ["+0", "-0=1", "+1", "-1=4"]


@APART
def test_closing_stops_what_runs(executor: Executor, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    places = [(first, second), (second, first), (tmp_path / "third", first)]
    work = executor.map(linger, places, lambda number: None)
    assert next(work) == (1, None)
    work.close()
    assert active_children() == []
    end = time.monotonic() + 20
    while alive(int(first.read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not (tmp_path / "third").exists()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def test_ray_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = r"^executor ray: expected the package ray \(pip install 'foreshot\[ray\]'\), found"
    with pytest.raises(ForeshotError, match=said):
        next(Ray(1).map(square, [1], lambda number: None))


@pytest.mark.slow
def test_ray_starts_a_cluster_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert outcomes(Ray(2), square, [2, 3]) == [4, 9]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(address: str, **options: object) -> None:
        raise ConnectionError(f"Failed to connect to {address}\nafter a minute")

    monkeypatch.setattr(ray, "init", init)
    said = "executor ray: expected a cluster at here:1, found Failed to connect to here:1 after a m"
    with pytest.raises(ForeshotError, match=f"^{said}"):
        next(Ray(1, address="here:1").map(square, [1], lambda number: None))
