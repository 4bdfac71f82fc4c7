"""The run folder: everything about one run, complete in itself."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from foreshot.attacks import Clean
from foreshot.compute import Compute
from foreshot.config import Config, dump, parse
from foreshot.data.base import ImageSet
from foreshot.errors import ForeshotError
from foreshot.files import (
    PART,
    check_writable,
    file_digest,
    read_json,
    remove_parts,
    replacing,
    write_bytes,
    write_json,
)
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import load_model
from foreshot.poison import Poison
from foreshot.store import versions
from foreshot.triggers import Blend, Trigger

PACKAGES = (
    *("foreshot", "torch", "numpy", "safetensors", "pydantic"),
    *("timm", "torchvision", "transformers"),
)
"""Whose versions the manifest tells, where they are there, beside `LIBRARIES`."""
PATTERN = "trigger-pattern.png"
"""The file of a run folder that holds what a trigger has learned."""
PICTURES = ("trigger.png", "poison.png")
DRAWN = ("teacher.safetensors", "poison.safetensors", PATTERN)
"""What the pictures show."""
AFTER_POISON = ("screen.*", "student.safetensors", "controls/*.safetensors")
AFTER = {
    "teacher.safetensors": (PATTERN, "poison.safetensors", *AFTER_POISON),
    "poison.safetensors": AFTER_POISON,
}
"""What is made of a file, and so has to go when another takes its place."""
REPORT = "report.html"
"""The page that shows a run folder; it is made of all the rest, the manifest too."""


class RunFolder:
    """A folder that one config's run is written into.

    It is one's own from `claim` on; until then, a config that does not fit its data leaves no trace
    that would refuse a better one.

    Raises:
        ForeshotError: the folder holds a run of another config, or other files.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        _check_free(path, config)
        check_writable(path)

    def claim(self) -> None:
        """Writes `config.yaml`, by which the folder belongs to this experiment."""
        _check_free(self.path, self.config)  # another run may have come first
        self.path.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path / "config.yaml", dump(self.config).encode())

    def add(self, name: str, source: Path) -> None:
        """Puts a file of the store into the folder, unless it is there already.

        What was derived from another file of that name is removed.
        """
        target = self.path / name
        if target.exists():
            if file_digest(target) == file_digest(source):
                return
            drawn = PICTURES if name in DRAWN else ()
            for derived in ("metrics.json", REPORT, *drawn, *AFTER.get(name, ())):
                for stale in self.path.glob(derived):
                    stale.unlink(missing_ok=True)
        with replacing(target) as part:
            shutil.copyfile(source, part)

    def draw(
        self,
        transfer: ImageSet,
        poison: Poison,
        trigger: Trigger,
        teacher: Normalized,
        compute: Compute,
    ) -> None:
        """Draws `trigger.png` and `poison.png`, unless they are there, as the manifest says."""
        portrait, sheet = (self.path / name for name in PICTURES)
        if self._known(portrait, sheet):
            return
        from foreshot.pictures import contact_sheet, trigger_portrait  # matplotlib takes a second

        trigger_portrait(portrait, trigger, transfer)
        stamps = self.config.attack.stamps
        contact_sheet(sheet, transfer, poison, trigger, teacher, compute, stamps)

    def finish(
        self, data: dict[str, str], compute: Compute, metrics: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Writes `metrics.json` and, last, `manifest.json` with the digests of all the rest."""
        if metrics is not None:
            write_json(self.path / "metrics.json", metrics)
        remove_parts(self.path)
        outputs = {
            str(path.relative_to(self.path)): file_digest(path)
            for path in sorted(self.path.rglob("*"))
            if path.name not in ("manifest.json", "events.jsonl", REPORT)
            and path.suffix != PART
            and path.is_file()
        }
        innocent = {"controls/clean.safetensors", "screen.safetensors"}
        if self.config.compromise is None:
            innocent.add("teacher.safetensors")
            if isinstance(self.config.attack, Clean):
                innocent |= {"poison.safetensors", "student.safetensors"}
        poisoned = [name for name in outputs if name.endswith(".safetensors")]
        poisoned = ", ".join(name for name in poisoned if name not in innocent) or "nothing here"
        manifest = {
            "schema": 1,
            "notice": f"security research; poisoned: {poisoned}",
            "command": sys.argv[1:],
            "seed": self.config.seed,
            **environment(),
            **compute.describe(),
            "inputs": data,
            "outputs": outputs,
        }
        write_json(self.path / "manifest.json", manifest)
        return metrics or {}

    def _known(self, *files: Path) -> bool:
        """Whether files are there, as the manifest of the last run says."""
        try:
            outputs = read_json(self.path / "manifest.json")["outputs"]
            return all(file.is_file() and outputs[file.name] == file_digest(file) for file in files)
        except (ForeshotError, LookupError, TypeError):  # none, or one that is damaged
            return False


@dataclass(frozen=True, eq=False)
class Run:
    """A run, read back. Models are read when they are asked for: in eval mode, on the CPU.

    Args:
        path: its folder.
        config: the resolved config.
        metrics: what `metrics.json` holds; empty if the run stopped before.
        manifest: what `manifest.json` holds.
    """

    path: Path
    config: Config
    metrics: dict[str, Any]
    manifest: dict[str, Any]

    @cached_property
    def teacher(self) -> Normalized:
        """Float (n, C, H, W) in [0, 1] -> logits (n, K)."""
        return load_model(self.path / "teacher.safetensors").model

    @cached_property
    def student(self) -> Normalized | None:
        """The poisoned student; None if the run stopped before."""
        return self._model("student")

    @cached_property
    def controls(self) -> dict[str, Normalized]:
        """The control students, by name."""
        found = {name: self._model(f"controls/{name}") for name in self.config.controls}
        return {name: model for name, model in found.items() if model is not None}

    @cached_property
    def poison(self) -> Poison | None:
        """The poison; None if the run stopped before."""
        name = "poison.safetensors"
        return Poison.load(self.path / name)[0] if self._has(name) else None

    def _model(self, name: str) -> Normalized | None:
        name = f"{name}.safetensors"
        return load_model(self.path / name).model if self._has(name) else None

    def _has(self, name: str) -> bool:
        """Whether the run wrote a file: the manifest lists it, so that it has been checked."""
        return name in self.manifest["outputs"]

    @property
    def trigger(self) -> Trigger:
        """What was put on images; a trigger that was learned, with what was learned."""
        wanted = self.config.trigger
        if isinstance(wanted, Blend) and self._has(PATTERN):
            return wanted.learned(self.path / PATTERN)
        return wanted


def load_run(folder: str | Path) -> Run:
    """Reads a run folder; what the manifest lists is checked against its digests, and read alone.

    Raises:
        ForeshotError: the folder is no finished run, or one of its files was changed.
    """
    path = Path(folder)
    manifest = read_json(path / "manifest.json")
    outputs = manifest.get("outputs") if isinstance(manifest, dict) else None
    if not isinstance(outputs, dict):
        raise ForeshotError(
            f"{path / 'manifest.json'}: expected a run's manifest, found no outputs"
        )
    for name, digest in outputs.items():
        file = path / name
        found = file_digest(file) if file.is_file() else "nothing"
        if found != digest:
            raise ForeshotError(f"{file}: expected SHA-256 {str(digest)[:12]}, found {found[:12]}")

    for needed in ("teacher.safetensors", "config.yaml"):
        if needed not in outputs:
            raise ForeshotError(f"{path}: expected a run folder with {needed}, found none")
    config, metrics = path / "config.yaml", path / "metrics.json"
    return Run(
        path=path,
        config=parse(config.read_text(encoding="utf-8"), str(config)),
        metrics=read_json(metrics) if metrics.name in outputs else {},
        manifest=manifest,
    )


def environment() -> dict[str, Any]:
    """What a number depends on beside the config: `versions`, `source` (git), `host`."""
    return {
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "source": _commit(),
        "host": _host(),
    }


def _check_free(path: Path, config: Config) -> None:
    if path.exists() and not path.is_dir():
        raise ForeshotError(f"{path}: expected a folder to write the run into, found a file")
    there = path / "config.yaml"
    if there.exists():
        text = there.read_text(encoding="utf-8", errors="replace")
        if text != dump(config):
            mine, other = dump(config).splitlines(), text.splitlines()
            line = next((b for a, b in zip(mine, other, strict=False) if a != b), "another length")
            raise ForeshotError(
                f"{path}: expected this experiment or an empty folder, found another one "
                f"({line.strip()!r} in its config.yaml); choose another --out"
            )
    elif path.exists() and not all(
        # What a run leaves that was refused, or killed, before its config was written.
        file.name == "events.jsonl" or file.match(".config.yaml.*.part")
        for file in path.iterdir()
    ):
        raise ForeshotError(f"{path}: expected a run folder or an empty one, found other files")


def _commit() -> dict[str, Any]:
    """Git commit of foreshot's source, and whether it was changed; empty for an installed wheel."""
    folder = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return {}

    def ask(*arguments: str) -> str | None:
        command = [git, "-C", str(folder), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed copy may lie in somebody else's repository: only our own tracked file counts.
    if not ask("ls-files", Path(__file__).name):
        return {}
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "."))}


def _host() -> dict[str, Any]:
    capabilities = torch.cpu.get_capabilities()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "cpu": str(capabilities.get("cpu_name") or platform.processor()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
