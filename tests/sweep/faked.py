"""Stands in for the experiment where a test is about the sweep alone; its fixtures."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import DIGITS
from foreshot.cli import main
from foreshot.compute import CPU
from foreshot.config import Config, dump
from foreshot.files import write_json

SWEEP = """
preset: tiny.yaml
set: [attack.epsilon=32]
grid: {attack.rate: [0.02, 0.05]}
cells:
  - [distillation.terms.0.loss.temperature=1]
  - [distillation.terms.0.loss.temperature=4, student.training.lr=0.1]
"""


def rate_(hits: int, total: int) -> dict[str, Any]:
    return {"value": hits / total, "hits": hits, "total": total, "low": 0.0, "high": 1.0}


SECONDS = {"teacher": 100.0, "poison": 10.0, "distill": 30.0, "controls": 32.0, "evaluate": 1.0}


@dataclass
class Fake:
    """Stands in for the experiment: writes a run folder at once, or fails."""

    ran: list[Config]
    failing: Callable[[Config], Exception | None] = lambda config: None

    def __call__(self, config: Config, out: Path, **keywords: Any) -> None:
        self.ran.append(config)
        error = self.failing(config)
        if error is not None:
            raise error
        student = {"clean_accuracy": rate_(90, 100), "asr": rate_(config.seed, 80), "asr_net": None}
        metrics = {
            "schema": 1,
            "teacher": {"clean_accuracy": rate_(95, 100), "per_class": {"a": rate_(1, 2)}},
            "student": student,
            "seconds": SECONDS | {"total": sum(SECONDS.values())},
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(dump(config))
        write_json(out / "metrics.json", metrics)
        student, commit = {"student.safetensors": "5" * 64}, {"commit": "c" * 40}
        made = {"seed": config.seed, "outputs": student, "source": commit, **CPU.describe()}
        write_json(out / "manifest.json", made)
        (out / "report.html").write_text("a page")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a config and a sweep, and an empty store."""
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(DIGITS)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    stand_in = Fake([])
    monkeypatch.setattr("foreshot.sweep.job.run", stand_in)
    return stand_in


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`foreshot sweep` in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foreshot", "sweep", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
