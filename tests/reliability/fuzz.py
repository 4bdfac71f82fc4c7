"""Files from outside, damaged and made up: each is refused by a ForeshotError, or read rightly.

`python tests/reliability/fuzz.py COUNT [LOADER ...]` reads so many files with each loader, and
prints what became of them. Which file is read follows from the seed, the loader and the number.
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from formats import LOADERS, Loader

from foreshot.errors import ForeshotError

SEED = 0
SECONDS = 20.0
"""A file that takes longer counts as a hang."""
ROOM = 1 << 30
"""Bytes of address space that reading may take beside what the process has before."""
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *("pickle.find_class", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "os.rename"),
    *("marshal.loads", "shutil.unpack_archive", "os.symlink", "os.link", "os.chmod", "os.mkdir"),
)
"""What reading never does: run, load or fetch something, or change what is not its own."""


@dataclass
class Outcome:
    """What became of the files that one loader was given.

    Args:
        loader: its name.
        files: how many.
        read: how many of them it read.
        refused: how many by a ForeshotError.
        faults: what else happened, by file number.
        slowest: seconds.
        grown: MiB by which the peak of memory rose.
        kinds: how often each mutation was drawn.
    """

    loader: str
    files: int = 0
    read: int = 0
    refused: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    slowest: float = 0.0
    grown: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


def mutated(name: str, number: int) -> tuple[str, bytes]:
    """The file of this number, and the kind of mutation that made it."""
    loader, chance = LOADERS[name], random.Random(f"{SEED} {name} {number}")
    kind = chance.choice((*loader.structured, damaged, damaged))
    content = chance.choice(loader.contents)
    return kind.__name__, kind(content, chance)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, put in, left out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        place = chance.randrange(len(data) + 1)
        size = chance.choice((1, 2, 4, 8, 64))
        match chance.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place : place + size] = chance.randbytes(size)
            case 2:
                data[place:place] = chance.choice((b"\0", b"\xff", b"\x7f", b"A")) * size
            case 3:
                del data[place : place + size]
            case 4:
                data[place:place] = data[place : place + size]
            case _:
                del data[place:]
    return bytes(data)


def fuzz(name: str, count: int, first: int = 0) -> Outcome:
    """Gives a loader files in a process of its own, and watches over it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        context = get_context("fork")
        at = context.Value("q", first)
        process = context.Process(target=_reads, args=(name, first, count, report, at))
        process.start()
        before, since = -1, time.monotonic()
        while process.is_alive():
            process.join(0.2)
            if at.value != before:
                before, since = at.value, time.monotonic()
            elif time.monotonic() - since > SECONDS:
                process.kill()
                process.join()
                return Outcome(name, faults={before: f"took more than {SECONDS} seconds"})
        if process.exitcode != 0:
            return Outcome(name, faults={at.value: f"ended the process: {process.exitcode}"})
        read = json.loads(report.read_text())
        faults = {int(number): fault for number, fault in read.pop("faults").items()}
        return Outcome(**read, faults=faults)


def _reads(name: str, first: int, count: int, report: Path, at: Any) -> None:
    torch.set_num_threads(1)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - of warnings
    loader, outcome, happened = LOADERS[name], Outcome(name), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"file{loader.suffix}"
        file.write_bytes(loader.contents[0])
        loader.read(file)  # whatever is imported late
        watch(happened, folder)
        room()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + count):
            at.value = number
            one(loader, file, number, outcome, happened)
        outcome.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10
        report.write_text(json.dumps(asdict(outcome)))
        happened.clear()


def one(loader: Loader, file: Path, number: int, outcome: Outcome, happened: list[str]) -> None:
    """Reads one file, and adds what became of it."""
    kind, content = mutated(outcome.loader, number)
    outcome.kinds[kind] = outcome.kinds.get(kind, 0) + 1
    outcome.files += 1
    file.write_bytes(content)
    happened.clear()
    began = time.perf_counter()
    try:
        found = loader.read(file)
    except ForeshotError as error:
        outcome.refused += 1
        if not str(error):
            outcome.faults[number] = f"{kind}: no sentence"
    except BaseException as error:  # that is the question
        outcome.faults[number] = f"{kind}: {type(error).__name__}: {error}"[:300]
    else:
        outcome.read += 1
        if wrong := loader.wrong(found, content):
            outcome.faults[number] = f"{kind}: {wrong}"
    outcome.slowest = max(outcome.slowest, round(time.perf_counter() - began, 3))
    if happened:
        outcome.faults[number] = f"{kind}: {happened[0]}"


def watch(happened: list[str], folder: str) -> None:
    """Writes down what must not happen; from now on, to the end of the process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            happened.append(f"{event} {arguments}"[:200])
        elif event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and not str(path).startswith(folder):
                happened.append(f"writes {path}")

    sys.addaudithook(hook)


def room() -> None:
    """Leaves so much memory and no more."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))


if __name__ == "__main__":
    for name in sys.argv[2:] or LOADERS:
        print(json.dumps(asdict(fuzz(name, int(sys.argv[1])))), flush=True)
