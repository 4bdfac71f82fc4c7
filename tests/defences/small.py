"""Small experiments with a defence, and what became of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from conftest import stripes
from foreshot.config import Config, parse
from foreshot.data.tensor import save_images
from foreshot.defences import Verdict
from foreshot.experiment import run
from foreshot.poison import Poison
from foreshot.progress import Event

NETWORK = {
    "model": {"name": "resnet", "depth": 8, "width": 0.5, "stem_stride": 2},
    "training": {"epochs": 5, "batch": 30, "lr": 0.1},
}
TRAIN, CLEAN, BAD = 300, 80, 30
TRANSFER = TRAIN - CLEAN


def save(folder: Path) -> Path:
    """Writes the images of `config`."""
    save_images(folder / "train.safetensors", stripes(TRAIN, 0))
    save_images(folder / "test.safetensors", stripes(120, 1))
    return folder


def config(data: Path, *settings: str, defence: Any = None) -> Config:
    tree = {
        "precision": "float32",
        "data": {
            "name": "tensor",
            "path": str(data / "train.safetensors"),
            "test_path": str(data / "test.safetensors"),
        },
        "teacher": NETWORK,
        "student": NETWORK,
        "trigger": {"name": "patch", "size": 2},
        "target": 1,
        "attack": {"name": "dirty_label", "count": BAD},
        "defender": {"clean": CLEAN, "drop": 0.05},
        "controls": [],
    }
    made = parse(yaml.safe_dump(tree), "test", settings)
    return made if defence is None else made.model_copy(update={"defence": defence})


@dataclass
class Done:
    out: Path
    metrics: dict[str, Any]
    heard: list[Event] = field(default_factory=list)

    def started(self) -> list[str]:
        return [event.stage for event in self.heard if event.kind == "start"]

    def poison(self) -> Poison:
        return Poison.load(self.out / "poison.safetensors")[0]

    def verdict(self) -> Verdict:
        return Verdict.load(self.out / "screen.safetensors")


def go(config: Config, home: Path, out: Path, **keywords: Any) -> Done:
    heard: list[Event] = []
    metrics = run(config, out, store=home, device="cpu", listener=heard.append, **keywords)
    return Done(out, metrics, heard)
