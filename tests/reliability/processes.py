"""foreshot's command line in processes of their own, and what can befall them."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from foreshot.cli import main
from foreshot.files import file_digest, read_json

TEXT = """
precision: float32
data: {name: digits}
validation: 0.8
teacher:
  model: {name: resnet, depth: 8, width: 0.25, stem_stride: 2}
  training: {epochs: 2, batch: 32}
trigger: {name: patch, size: 2}
target: 3
attack: {name: pgd, rate: 0.1, epsilon: 32, steps: 3, retries: 0}
defence: {name: second_teacher}
defender: {clean: 60, remove: 0.05}
student:
  model: {name: resnet, depth: 8, width: 0.25, stem_stride: 2}
  training: {epochs: 2, batch: 32, augment: crop}
"""
"""Two teachers, poison, screens, a student and two control students, in seconds."""
Before = Callable[[], object]
for late in ("kornia", "sklearn.datasets", "torch._dynamo"):
    import_module(late)  # once, before the fork
for late in ("experiment", "pictures", "tables"):
    import_module(f"foreshot.{late}")


@dataclass(frozen=True)
class Place:
    """A folder with a config, a store and run folders in it."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def home(self) -> Path:
        return self.root / "home"

    def start(
        self,
        *arguments: str,
        before: Before | None = None,
        out: str = "out",
        home: str = "home",
        command: str = "run",
    ) -> BaseProcess:
        """Starts foreshot here; torch is imported already, and has one thread to fork."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "tiny.yaml").write_text(TEXT)
        line = [command, "tiny.yaml", "--device", "cpu", "--out", out, *arguments]
        process = get_context("fork").Process(target=_main, args=(self.root, home, line, before))
        process.start()
        return process

    def run(self, *arguments: str, **keywords: Any) -> int:
        """Runs it to its end, whatever that is; returns the exit code."""
        process = self.start(*arguments, **keywords)
        return ended(process)

    @property
    def said(self) -> str:
        """What the last run that was waited for wrote to stderr."""
        return (self.root / "stderr").read_text()

    def artefacts(self, out: str = "out") -> dict[str, Any]:
        """All that a run leaves whose bits must not depend on how it came about."""
        found: dict[str, Any] = {}
        for path in sorted(self.home.glob("store/*/*/*")):
            if path.name == "done.json":
                found[str(path.parent)] = read_json(path)["digests"]
            else:
                found[str(path)] = file_digest(path)
        folder = self.root / out
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path.suffix not in (".json", ".jsonl", ".html"):  # they hold seconds
                found[str(path)] = file_digest(path)
        found["metrics"] = read_json(folder / "metrics.json") | {"seconds": None}
        found["manifest"] = read_json(folder / "manifest.json")
        del found["manifest"]["outputs"]["metrics.json"]
        if (folder / "screen.json").exists():
            found["screen"] = read_json(folder / "screen.json")
        return {name.replace(f"{self.root}/", ""): value for name, value in found.items()}


def ended(process: BaseProcess, seconds: float = 120) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _main(root: Path, home: str, line: list[str], before: Before | None) -> None:
    os.chdir(root)
    os.environ["FORESHOT_HOME"] = home
    # pytest looks at what is written to its own.
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = Path("stderr").open("w")  # noqa: SIM115
    sys.argv = ["foreshot", *line]
    if before is not None:
        before()
    main()


# What can befall them ----------------------------------------------------------------------------


def at_change(number: int) -> Before:
    """Killed just before a change to the file system, counted from 1; see `counted`."""
    return lambda: _watch(number, None)


def counted(log: Path) -> Before:
    """Writes down how many changes to the file system a run makes."""
    return lambda: _watch(0, log)


def _watch(number: int, log: Path | None) -> None:
    here, count = str(Path.cwd()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR))
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path, changes = arguments[0], True
        else:
            return
        place = os.path.abspath(path) if isinstance(path, str | Path) else ""  # noqa: PTH100
        if not changes or not place.startswith(here) or place == str(log):
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if log is not None:
            log.write_text(str(count))

    sys.addaudithook(hook)


def at_byte(number: int) -> Before:
    """Killed by the system in the middle of the first file that grows beyond so many bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        full(number)()

    return limit


def full(number: int) -> Before:
    """No file can grow beyond so many bytes: to Python that is an error, as is a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def after(seconds: float, process: BaseProcess) -> int:
    """Kills a process after some time; returns its exit code."""
    time.sleep(seconds)
    process.kill()
    return ended(process)


def flip(file: Path, chance: random.Random) -> None:
    """Turns one bit of a file around."""
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
