"""A set that memory does not hold is mapped from its file, and nothing else changes."""

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import foreshot.data.mapped
from foreshot.compute import CPU
from foreshot.data import ImageSet, Splits
from foreshot.data.folder import Folder
from foreshot.data.hf import HuggingFace
from foreshot.data.tensor import TensorFile, save_images
from foreshot.distillation import KD, Distiller, Term
from foreshot.poison import Poison
from foreshot.progress import Event
from foreshot.training import Samples, Training, fit

STATUS = Path("/proc/self/status")


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(foreshot.data.mapped, "HELD", 0)


def some(count: int, shape: tuple[int, int, int], seed: int) -> ImageSet:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=random)
    return ImageSet(images, torch.arange(count) % 2, ("cat", "dog"))


def pictures(root: Path) -> Path:
    for index, image in enumerate(some(8, (3, 8, 8), 0).images):
        file = root / ("cat", "dog")[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return root


def tensors(folder: Path) -> TensorFile:
    for name, seed in (("train", 1), ("test", 2)):
        save_images(folder / name, some(6, (3, 8, 8), seed))
    return TensorFile(path=folder / "train", test_path=folder / "test")


DATASETS: dict[str, Callable[[Path], TensorFile | Folder | HuggingFace]] = {
    "tensor": tensors,
    "folder": lambda folder: Folder(root=pictures(folder / "pictures"), size=8),
    "hf": lambda folder: HuggingFace(path=pictures(folder / "pictures"), test=None),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", DATASETS)
def test_a_mapped_set_is_the_same_set(
    name: str, small_memory: Callable[[], None], tmp_path: Path
) -> None:
    dataset, cache = DATASETS[name](tmp_path), tmp_path / "cache"
    held = dataset.load(cache)
    assert held.train.again is None
    assert not cache.exists()
    small_memory()
    mapped = dataset.load(cache)
    assert [part.digest for part in mapped] == [part.digest for part in held]
    if name == "hf":  # what is held out of a set is selected into memory
        return
    changed = mapped.train.replaced(torch.tensor([2]), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert mapped.train.again is not None
    assert torch.equal(mapped.train.images, held.train.images)
    assert torch.equal(mapped.train.again(), held.train.images)
    assert torch.equal(dataset.load(cache).train.images, held.train.images)
    assert changed.images[2].sum() == 0
    assert torch.equal(changed.images[3:], held.train.images[3:])


def test_a_file_goes_with_its_last_user(small_memory: Callable[[], None], tmp_path: Path) -> None:
    dataset, cache = DATASETS["folder"](tmp_path), tmp_path / "cache"
    small_memory()
    loaded: Splits | None = dataset.load(cache)
    assert len(list(cache.iterdir())) == 2
    del loaded
    assert not list(cache.iterdir())


def anonymous() -> int:
    """Bytes of this process that are in memory and in no file, without what was freed."""
    with suppress(AttributeError):  # glibc keeps what other tests have used
        ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1]) << 10


class Glance(nn.Module):
    """A network that is fast on large pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(x[:, :, ::32, ::32].mean((2, 3)))


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read off Linux' /proc")
def test_distillation_streams_what_memory_does_not_hold(
    small_memory: Callable[[], None], tmp_path: Path
) -> None:
    file, size = tmp_path / "train", 800 * 3 * 192 * 192
    save_images(file, some(800, (3, 192, 192), 1))
    dataset, weights, peaks = TensorFile(path=file, test_path=file), [], []

    def distilled() -> None:
        torch.manual_seed(0)
        teacher, student, before, peak = Glance(), Glance(), anonymous(), 0

        def listen(event: Event) -> None:
            nonlocal peak
            peak = max(peak, anonymous() - before)

        train = dataset.load(tmp_path).train
        poison = Poison(torch.tensor([3, 700]), torch.zeros(2, 3, 192, 192, dtype=torch.uint8))
        distiller, schedule = Distiller(student, teacher, [Term(KD())]), Training(epochs=1, batch=8)
        images = poison.apply(train).images
        fit(distiller, Samples(images), schedule, CPU, seed=0, stage="x", listener=listen)
        weights.append(student.classify.weight.detach().clone())
        peaks.append(peak)

    distilled()
    small_memory()
    distilled()
    assert torch.equal(*weights)
    assert peaks[0] > 2 * size, "clean and poisoned are held in memory"
    assert peaks[1] < size / 4
