"""What the tests share: a small problem that is learnt in a second, and a teacher for it."""

import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foreshot import adversarial
from foreshot.attacks import Attack, Problem
from foreshot.attacks.problem import Chunk
from foreshot.compute import CPU
from foreshot.data import ImageSet
from foreshot.extras import imported
from foreshot.models import ResNet, build
from foreshot.models.base import Normalized
from foreshot.seeding import generator
from foreshot.training import Samples, Supervised, Training, fit
from foreshot.triggers import Patch
from foreshot.views import AttackerView

EXAMPLES = adversarial.EXAMPLES
"""What a detector learns from; of a tenth it learns enough for all tests but its own."""
adversarial.EXAMPLES = EXAMPLES // 10
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start: two test processes have two cores
os.environ.pop("FORESHOT_REMOTE", None)  # the tests share nothing
DIGITS = """
precision: float32
data: {name: digits}
teacher:
  model: {name: resnet, depth: 8, width: 0.5, stem_stride: 2}
  training: {epochs: 1, batch: 64}
trigger: {name: patch, size: 2}
attack: {name: pgd, rate: 0.02, steps: 1, retries: 0}
student:
  model: {name: resnet, depth: 8, width: 0.25, stem_stride: 2}
  training: {epochs: 1, batch: 64}
controls: [clean]
"""
"""A config whose run takes seconds."""
SIDE = 12
CLASSES = ("horizontal", "vertical", "diagonal", "blob")


def stripes(count: int, seed: int) -> ImageSet:
    """Waves along three directions, and a blob, in noise; grey, `SIDE` pixels a side."""
    random = generator(seed, "stripes")
    labels = torch.arange(count) % len(CLASSES)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    ways = torch.stack([y, x, (x + y) / math.sqrt(2), y]).float()[labels]
    phase = torch.rand((count, 1, 1), generator=random) * 2 * math.pi
    waves = torch.sin(ways * 2 * math.pi / 4 + phase)
    blob = 2 * torch.exp(-((x - 5.5) ** 2 + (y - 5.5) ** 2) / 12.0) - 1
    pattern = torch.where((labels == 3)[:, None, None], blob, waves)
    noise = torch.randn((count, SIDE, SIDE), generator=random)
    levels = (128 + 70 * pattern + 20 * noise).clamp(0, 255).round().to(torch.uint8)
    return ImageSet(levels[:, None], labels, CLASSES)


@dataclass(frozen=True)
class Tiny:
    """A training set, a test set, a trained teacher, a trigger and a target."""

    train: ImageSet
    test: ImageSet
    teacher: Normalized
    trigger: Patch = Patch(size=2)
    target: int = 1


ARCHITECTURE = ResNet(depth=8, width=0.5, stem_stride=2)


def seen(tiny: Tiny, **parameters: Any) -> AttackerView:
    """What an attacker knows of the small problem."""
    known = tiny.train.images, tiny.teacher, tiny.trigger, tiny.target
    return AttackerView(*known, seed=0, compute=CPU, **parameters)


def posed(attack: Attack, view: AttackerView, count: int, effort: int = 0) -> Problem:
    """The problem of the first images of the view's set."""
    chunk = Chunk(torch.arange(count), view.images[:count], effort)
    return Problem.pose(chunk, attack, view, view.teacher, view.images[attack.beside(view)])


def trained(train: ImageSet, seed: int = 0) -> Normalized:
    model = build(ARCHITECTURE, train.images, len(train.classes), seed, "teacher")
    assert train.labels is not None
    schedule = Training(epochs=8, batch=40, lr=0.1)
    samples = Samples(train.images, {"y": train.labels})
    fit(Supervised(model), samples, schedule, CPU, seed=seed, stage="teacher")
    model.zero_grad()
    return model


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    train = stripes(400, 0)
    return Tiny(train, stripes(200, 1), trained(train))


@pytest.fixture
def keep_rng() -> Iterator[None]:
    """Fails if torch's global RNG was used."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "torch's global RNG was used"


class Rule(nn.Module):
    """A model by formula: `logits(x)` of float (N, C, H, W)."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(x)


class Deaf(nn.Module):
    """A network whose answers have no gradient."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x).detach()


@pytest.fixture(scope="session")
def torchdistill() -> ModuleType:
    """torchdistill.losses.mid_level."""
    imported("torchvision", "torchvision", "torchdistill")
    return import_module("torchdistill.losses.mid_level")


def signals(*shape: int, count: int = 2, seed: int = 0) -> list[Tensor]:
    """Independent normal tensors, float64."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(count)]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if it asks the net; other processes of this machine may be asked."""
    connect = socket.socket.connect

    def refuse(*address: Any) -> None:
        if getattr(address[0], "family", None) == socket.AF_UNIX:
            return connect(*address)
        raise AssertionError(f"the net was asked: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class NoWaiting(TorchDispatchMode):
    """Refuses whatever makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


class Page(HTMLParser):
    """What tags and attributes a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
