"""Crafting over several workers: the same poison, however its chunks are spread, and when one dies.

`Elsewhere` is a worker without a process: all that goes there and comes back is pickled.
"""

import os
import signal
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path
from pickle import dumps, loads
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import DIGITS, Rule, Tiny, seen
from foreshot.attacks import ATTACKS, Attack, Counterfactual, Noise, Pgd, Problem, craft
from foreshot.attacks.crafting import CHUNK
from foreshot.cli import main
from foreshot.compute import CPU, with_threads
from foreshot.errors import ForeshotError
from foreshot.executor import HERE, Executor, Failure, Outcomes, Processes, Ray, Serial
from foreshot.files import file_digest
from foreshot.models import ResNet
from foreshot.progress import Event
from foreshot.training import Training
from foreshot.views import AttackerView

QUICK: dict[str, Any] = {"count": 150, "steps": 2, "epsilon": 20}
STUDENT = ResNet(depth=8, width=0.25, stem_stride=2)
PLAIN = Pgd(**QUICK, retries=0)
REHEARSED = Counterfactual(**QUICK, retries=0, student=STUDENT, training=Training(epochs=1))


class Elsewhere:
    """Takes the items in an order of its own, with two threads of torch, in this process."""

    def __init__(self, order: int = 0) -> None:
        self.random = Random(order)
        self.work: list[int] = []
        self.items: list[int] = []

    def map(
        self, work: Callable[[Any], Any], items: Sequence[Any], started: Callable[[int], None]
    ) -> Outcomes[Any]:
        packed = dumps(work)
        self.work.append(len(packed))
        for number in self.random.sample(range(len(items)), len(items)):
            item = dumps(items[number])
            self.items.append(len(item))
            with with_threads(2):
                [(_, outcome)] = Serial().map(loads(packed), [loads(item)], started)
            yield number, loads(dumps(outcome))


class Threads(Noise):
    """Shows in the poison how many threads crafted it."""

    def perturb(self, problem: Problem) -> Tensor:
        return problem.low if torch.get_num_threads() == 1 else problem.high


class Lost:
    """Loses every worker twice."""

    def map(self, work: Any, items: Sequence[Any], started: Any) -> Outcomes[Any]:
        yield from ((n, Failure("its process was killed by signal 9")) for n in range(len(items)))


class Looks(Noise):
    """Looks at the set, and did not say at which images."""

    def perturb(self, problem: Problem) -> Tensor:
        return problem.start + problem.view.images[0]


class Darkness(nn.Module):
    """A detector by formula."""

    def forward(self, x: Tensor) -> Tensor:
        return -x.mean((1, 2, 3))


def assert_same(attack: Attack, tiny: Tiny, executor: Executor, **parameters: Any) -> None:
    """The poison of several chunks is that which is crafted here."""
    here = attack.craft(seen(tiny))
    assert len(here) > CHUNK
    assert attack.craft(seen(tiny, executor=executor, **parameters)).digest == here.digest


@pytest.mark.parametrize("key", ATTACKS)
def test_every_attack_crafts_the_same_without_the_set(key: str, tiny: Tiny) -> None:
    fields = {field: v for field, v in QUICK.items() if field in ATTACKS[key].model_fields}
    searches = {"searches": 2} if key == "cw_l2" else {}
    anything = {"base": "any", "count": 70, "retries": 1, "confidence": 0.9}
    attack = ATTACKS[key].model_validate({"name": key, **fields, **searches, **anything})
    executor, answers = Elsewhere(), seen(tiny).answers()
    known = {"students": (tiny.teacher,), "detectors": (Darkness(),), "teacher_logits": answers}
    views = (seen(tiny, executor=where, **known) for where in (HERE, executor))
    here, there = (Attack.craft(attack, view) for view in views)
    assert here.digest == there.digest
    assert len(here) == 70
    assert len(executor.items) >= 2


@given(order=st.integers(0, 10**6), count=st.integers(1, 160), retries=st.integers(0, 1))
@settings(deadline=None, max_examples=8)
def test_neither_order_nor_number_of_the_chunks_matters(
    tiny: Tiny, order: int, count: int, retries: int
) -> None:
    attack = Pgd(steps=1, count=count, epsilon=8, retries=retries)
    here, there = (attack.craft(seen(tiny, executor=where)) for where in (HERE, Elsewhere(order)))
    assert here.digest == there.digest


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5])
def test_pieces_of_the_images_add_up_to_the_whole(pieces: int, tiny: Tiny) -> None:
    attack, bases = Pgd(steps=2, retries=1), torch.arange(7, 177)
    whole = attack.craft(seen(tiny, bases=bases))
    parts = [
        attack.craft(seen(tiny, executor=Elsewhere(pieces), bases=part))
        for part in bases.tensor_split(pieces)
    ]
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_what_travels_does_not_grow_with_the_set(tiny: Tiny) -> None:
    bases, sizes = torch.arange(100), []
    for times in (1, 10):
        executor, images = Elsewhere(), tiny.train.images.repeat(times, 1, 1, 1)
        known = images, tiny.teacher, tiny.trigger, tiny.target, 0, CPU
        Pgd(steps=1, retries=0).craft(AttackerView(*known, bases, executor=executor))
        sizes.append((executor.work, sorted(executor.items)))
    assert sizes[0] == sizes[1]
    [[work], items] = sizes[0]
    weights = sum(4 * tensor.numel() for tensor in tiny.teacher.state_dict().values())
    assert weights < work < 1.5 * weights + 30_000
    pixels = tiny.train.images[0].numel()
    assert [round(size / pixels / 36) for size in items] == [1, 2]  # 36 and 64 images


def test_a_worker_has_as_many_threads(tiny: Tiny) -> None:
    assert_same(Threads(count=100), tiny, Elsewhere())


def test_progress_adds_up(tiny: Tiny) -> None:
    heard: list[Event] = []
    attack = Pgd(count=150, epsilon=1, steps=1, retries=1, base="any")
    attack.craft(seen(tiny, executor=Elsewhere(3), listener=heard.append))
    steps = [event for event in heard if event.kind == "advance"]
    assert (heard[0].kind, heard[0].total) == ("start", 150)
    done = [0, *(event.done for event in steps)]
    first = [after - before for before, after in pairwise(done)][:3]
    assert sorted(first) == [22, 64, 64]
    assert done == sorted(done)
    assert (heard[-1].kind, heard[-1].done) == ("end", steps[-1].total)
    assert steps[-1].done == steps[-1].total > 150


def test_two_processes_craft_the_same_although_they_are_killed(tiny: Tiny) -> None:
    killed: list[int] = []

    def kill(event: Event) -> None:
        if event.kind == "advance" and not killed:
            killed.extend(child.pid or 0 for child in active_children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    assert_same(REHEARSED, tiny, Processes(2), listener=kill)
    assert len(killed) == 2
    assert active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("attack", [PLAIN, REHEARSED], ids=lambda attack: attack.name)
def test_ray_crafts_the_same(attack: Attack, tiny: Tiny) -> None:
    pytest.importorskip("ray")
    assert_same(attack, tiny, Ray(2))


def test_a_worker_that_is_lost_is_a_sentence(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="^crafting: its process was killed by signal 9$"):
        PLAIN.craft(seen(tiny, executor=Lost()))


def test_an_error_in_a_worker_is_a_sentence_with_its_traceback(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="^crafting: IndexError: index 0 is out of b") as caught:
        Looks(count=5).craft(seen(tiny, executor=Elsewhere()))
    assert "problem.view.images[0]" in caught.value.__notes__[0]


def test_a_teacher_that_cannot_travel_is_a_sentence(tiny: Tiny) -> None:
    teacher = Rule(lambda x: x.flatten(1)[:, :4])
    said = "^executor processes: expected what pickle can send, found Can't pickle local object"
    with pytest.raises(ForeshotError, match=said):
        craft(PLAIN, tiny.train.images, teacher, tiny.trigger, 1, executor=Processes(2))


def test_the_command_leaves_the_poison_of_one_process_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(DIGITS)

    def poison(home: str, out: str, *options: str) -> str:
        monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / home))
        sized = "--set", "attack.rate=0.1", "--device", "cpu", "--out", out
        monkeypatch.setattr("sys.argv", ["foreshot", "poison", "tiny.yaml", *sized, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    assert "[poison] start: 144 images" in poison("one", "serial")
    assert "[poison] start: 144 images" in poison("two", "apart", "--workers", "2")
    assert "[poison] note: found in the store" in poison("two", "again", "--threads", "1")
    digests = {file_digest(Path(out) / "poison.safetensors") for out in ("serial", "apart")}
    assert len(digests) == 1


def test_several_serial_workers_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["foreshot", "poison", "--executor", "serial", "--workers", "2"]
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "foreshot: executor serial: expected 1 worker, found 2\n"
