"""Where independent pieces of work run: here, in processes, on Ray. The store holds all state.

The one seam is `map`: a function and a list of items go in, pairs of an item's number and what came
of it come out, in the order in which they end. Whatever the function raises, and the death of the
process that it ran in, comes out as a `Failure`, and concerns that item alone.
"""

import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from foreshot.errors import ForeshotError, brief, printable

T = TypeVar("T")
R = TypeVar("R")
RETRIES = 1
"""How often an item is tried again whose process died: once may be chance, twice is the item."""


@dataclass(frozen=True)
class Failure:
    """What is known of an item that came to nothing.

    Args:
        reason: one sentence.
        trace: the traceback, of an error that nobody foresaw.
    """

    reason: str
    trace: str = ""


Outcomes = Generator[tuple[int, R | Failure], None, None]
"""Numbers of items, and what came of them."""


class Executor(Protocol):
    """Something that runs a function on many items."""

    def map(
        self,
        work: Callable[[T], R],
        items: Sequence[T],
        started: Callable[[int], None],
    ) -> Outcomes[R]:
        """Runs `work` on every item; closing the generator stops what still runs.

        Args:
            work: a function of a module; its argument and its result travel between processes.
            items: in the order in which they are to be started.
            started: hears the number of each item that begins.
        """
        ...


@dataclass(frozen=True)
class Serial:
    """One after the other, in this process."""

    def map(
        self, work: Callable[[T], R], items: Sequence[T], started: Callable[[int], None]
    ) -> Outcomes[R]:
        """See `Executor.map`."""
        for number, item in enumerate(items):
            started(number)
            yield number, _attempt(work, item)


HERE = Serial()
"""Where work runs if nothing else is said."""


@dataclass(frozen=True)
class Processes:
    """On this machine, in processes that take one item after the other.

    Args:
        workers: how many.
    """

    workers: int

    def map(
        self, work: Callable[[T], R], items: Sequence[T], started: Callable[[int], None]
    ) -> Outcomes[R]:
        """See `Executor.map`."""
        packed = _packed(work)
        left = deque((number, RETRIES) for number in range(len(items)))
        idle: list[_Worker] = []
        busy: dict[Connection, tuple[_Worker, int, int]] = {}
        try:
            while left or busy:
                while left and len(busy) < self.workers:
                    number, retries = left.popleft()
                    # One may have died since its last item, for which the next is not to blame; a
                    # second try has a process of its own.
                    while idle and (retries < RETRIES or not idle[-1].process.is_alive()):
                        idle[-1].process.terminate()
                        idle.pop().end()
                    worker = idle.pop() if idle else _Worker(packed)
                    busy[worker.pipe] = worker, number, retries
                    started(number)
                    worker.send(_packed(items[number]))
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    worker, number, retries = busy.pop(pipe)
                    try:
                        outcome = pipe.recv()
                        idle.append(worker)
                    except (EOFError, OSError):
                        reason = worker.end()
                        if retries:
                            left.appendleft((number, retries - 1))
                            continue
                        outcome = Failure(f"its process {reason}, {RETRIES + 1} times")
                    yield number, outcome
        finally:
            for worker in (*idle, *(worker for worker, _, _ in busy.values())):
                worker.process.terminate()
                worker.end()


class _Worker:
    """A process that does one piece of work after the other, and this end of its pipe."""

    def __init__(self, work: bytes) -> None:
        # Not forked: a copy of a process with torch's threads in it hangs.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.send(work)

    def send(self, packed: bytes) -> None:
        """Sends the work, or an item of it."""
        with suppress(OSError):  # it has died; `wait` tells
            self.pipe.send_bytes(packed)

    def end(self) -> str:
        """Waits for the process to end; returns how it did."""
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _serve(pipe: Connection) -> None:
    """What a worker does until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end to answer
    work = pipe.recv()
    with suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(pickle.dumps(_attempt(work, pipe.recv())))


def _packed(what: object) -> bytes:
    """Work or an item of it, ready to be sent.

    By `Connection.send` torch would move tensors of this process into shared memory, of which
    containers have little.
    """
    try:
        return pickle.dumps(what)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        found = printable(brief(error))
        raise ForeshotError(
            f"executor processes: expected what pickle can send, found {found}"
        ) from None


@dataclass(frozen=True)
class Ray:
    """On a Ray cluster, or on this machine through Ray.

    Args:
        workers: most items at once.
        cpus: cores that Ray keeps for an item.
        gpus: GPUs that Ray keeps for an item; with 0.25 four share one, with 0 none is seen.
        address: of a cluster, which sees this machine's folders under the same names; None starts
            one here, and ends it afterwards.
    """

    workers: int
    cpus: int = 1
    gpus: float = 0
    address: str | None = None

    def map(
        self, work: Callable[[T], R], items: Sequence[T], started: Callable[[int], None]
    ) -> Outcomes[R]:
        """See `Executor.map`."""
        from foreshot.extras import imported  # brings torch, which a new process can do without
        from foreshot.remote import VARIABLE
        from foreshot.store import home, remote_url

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray: Any = imported("ray", "ray", "executor ray")
        places = {"FORESHOT_HOME": str(home().resolve()), VARIABLE: remote_url()}
        here = {"num_cpus": self.workers * self.cpus, "include_dashboard": False}
        try:
            ray.init(
                address=self.address or "local",
                logging_level="error",
                log_to_driver=False,
                runtime_env={"env_vars": places},
                **({} if self.address else here),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ForeshotError(
                f"executor ray: expected a cluster at {self.address or 'local'}, "
                f"found {brief(error)}"
            ) from None
        task = ray.remote(_attempt).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES
        )
        left, busy = deque(range(len(items))), {}
        try:
            shared = ray.put(work)  # what it holds travels once to each machine
            while left or busy:
                while left and len(busy) < self.workers:
                    number = left.popleft()
                    busy[task.remote(shared, items[number])] = number
                    started(number)
                for ready in ray.wait(list(busy))[0]:
                    try:
                        outcome = ray.get(ready)
                    except ray.exceptions.RayError as error:
                        outcome = Failure(f"its process was lost: {printable(brief(error))}")
                    yield busy.pop(ready), outcome
        finally:
            for running in busy:
                ray.cancel(running, force=True)
            ray.shutdown()


def _attempt(work: Callable[[T], R], item: T) -> R | Failure:
    try:
        return work(item)
    except ForeshotError as error:
        return Failure(str(error))
    except Exception as error:
        return Failure(printable(f"{type(error).__name__}: {brief(error)}"), traceback.format_exc())
