"""The training loop learns, goes on where it was killed, and sees the views that it should."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from conftest import ARCHITECTURE, Tiny
from foreshot.augment import augment
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.files import read_tensors
from foreshot.inference import logits
from foreshot.models import build
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import state_digest
from foreshot.progress import Event
from foreshot.training import Samples, Supervised, Training, fit

SCHEDULE = Training(epochs=3, batch=32, lr=0.1, augment="crop_flip")


def fresh(tiny: Tiny) -> Normalized:
    return build(ARCHITECTURE, tiny.train.images, 4, 0, "student")


def train(model: nn.Module, tiny: Tiny, schedule: Training = SCHEDULE, **keywords: Any) -> str:
    """Trains on a part of the set that leaves a rest in the last batch; returns the digest."""
    assert tiny.train.labels is not None
    samples = Samples(tiny.train.images[:150], {"y": tiny.train.labels[:150]})
    fit(Supervised(model), samples, schedule, CPU, **{"seed": 5, "stage": "student"} | keywords)
    return state_digest(model)


class Forgetful(nn.Module):
    """A network of which training leaves out a half at random, as dropout does."""

    def __init__(self, tiny: Tiny) -> None:
        super().__init__()
        self.of, self.drop = fresh(tiny), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.drop(x))


def test_dropout_follows_from_the_seed_and_goes_on_where_it_was(
    tiny: Tiny, tmp_path: Path, keep_rng: None
) -> None:
    before = torch.get_rng_state()
    expected = train(Forgetful(tiny), tiny)
    torch.rand(3)  # what others draw meanwhile
    assert train(Forgetful(tiny), tiny) == expected
    assert train(Forgetful(tiny), tiny, seed=6) != expected
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train(Forgetful(tiny), tiny, checkpoint=file, listener=killer("advance", 7))
    assert train(Forgetful(tiny), tiny, checkpoint=file) == expected
    torch.set_rng_state(before)


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny) -> str:
    return train(fresh(tiny), tiny)


class Killed(BaseException):
    """What a listener raises to end a training as a signal would."""


def killer(kind: str, times: int) -> Any:
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if sum(other.kind == kind for other in heard) == times:
            raise Killed

    return listen


@pytest.mark.parametrize(
    ("kind", "times", "resumed"),
    [("advance", 2, 0), ("epoch", 1, 0), ("advance", 7, 1), ("epoch", 2, 1), ("advance", 14, 2)],
)
def test_a_killed_training_ends_with_the_same_bits(
    kind: str, times: int, resumed: int, tiny: Tiny, undisturbed: str, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train(fresh(tiny), tiny, checkpoint=file, listener=killer(kind, times))
    heard: list[Event] = []
    assert train(fresh(tiny), tiny, checkpoint=file, listener=heard.append) == undisturbed
    assert (heard[0].kind, heard[0].done, heard[0].total) == ("start", resumed * 150, 450)
    assert [event.done for event in heard if event.kind == "epoch"] == [
        150 * epoch for epoch in range(resumed + 1, 4)
    ]


def test_a_training_that_is_killed_in_every_epoch_ends_with_the_same_bits(
    tiny: Tiny, undisturbed: str, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    for _ in range(2):
        with pytest.raises(Killed):
            train(fresh(tiny), tiny, checkpoint=file, listener=killer("advance", 6))
    assert int(read_tensors(file)[1]["epochs"]) == 2
    assert train(fresh(tiny), tiny, checkpoint=file) == undisturbed


def test_watching_changes_nothing_and_is_told_after_each_epoch(
    tiny: Tiny, undisturbed: str
) -> None:
    model, told, seen = fresh(tiny), [], []

    def watch() -> dict[str, float]:
        said = logits(model, tiny.test.images, CPU)
        seen.append(float(said.mean()))
        return {"mean": seen[-1]}

    def listen(event: Event) -> None:
        if event.kind == "epoch":
            told.append(event.values["mean"])

    assert train(model, tiny, watch=watch, listener=listen) == undisturbed
    assert told == seen
    assert len(set(seen)) == SCHEDULE.epochs
    assert seen[-1] == float(logits(model, tiny.test.images, CPU).mean())


def test_training_uses_no_global_randomness(tiny: Tiny, undisturbed: str, keep_rng: None) -> None:
    model = fresh(tiny)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert train(model, tiny) == undisturbed
    assert not model.training


@pytest.mark.parametrize("other", [{"seed": 6}, {"stage": "teacher"}])
def test_seed_and_stage_key_the_order(other: dict[str, Any], tiny: Tiny, undisturbed: str) -> None:
    assert train(fresh(tiny), tiny, **other) != undisturbed
    assert train(fresh(tiny), tiny, label="another name") == undisturbed


def test_it_learns(tiny: Tiny) -> None:
    assert tiny.test.labels is not None
    said = logits(tiny.teacher, tiny.test.images, CPU)
    assert (said.argmax(1) == tiny.test.labels).float().mean() > 0.95
    untrained = logits(fresh(tiny), tiny.test.images, CPU)
    assert (untrained.argmax(1) == tiny.test.labels).float().mean() < 0.6


def test_one_step_is_nesterov_with_weight_decay() -> None:
    """Two full batches of a linear model, against the update written out."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 1, 2, 2), generator=random).to(torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    reference = deepcopy(network)
    schedule = Training(epochs=3, batch=6, lr=0.3, warmup=0.25, momentum=0.8, weight_decay=0.01)
    fit(Supervised(network), Samples(images, {"y": labels}), schedule, CPU, seed=0, stage="x")
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for lr in (0.0, 0.3 * (1 + math.cos(math.pi * (1 / 3 - 0.25) / 0.75)) / 2,
               0.3 * (1 + math.cos(math.pi * (2 / 3 - 0.25) / 0.75)) / 2):  # fmt: skip
        said = reference(images / 255)
        loss = (torch.logsumexp(said, 1) - said[torch.arange(6), labels]).mean()
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                g = g + 0.01 * p
                v.mul_(0.8).add_(g)
                p.sub_(lr * (g + 0.8 * v))
    for found, expected in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_every_image_is_seen_once_an_epoch_with_its_own_target() -> None:
    seen: list[tuple[int, int]] = []

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            levels = (x[:, 0, 0, 0] * 255).round().long().tolist()
            seen.extend(zip(levels, y.tolist(), strict=True))
            return {"loss": self.weight * 1.0}

    images = torch.arange(50).to(torch.uint8).reshape(50, 1, 1, 1).expand(50, 1, 4, 4)
    samples = Samples(images, {"y": torch.arange(50) + 1000})
    fit(Notes(), samples, Training(epochs=2, batch=16), CPU, seed=0, stage="x")
    assert len(seen) == 100
    assert sorted(seen[:50]) == [(i, 1000 + i) for i in range(50)]
    assert sorted(seen[50:]) == sorted(seen[:50])
    assert seen[50:] != seen[:50]
    assert seen[:50] != sorted(seen[:50])
    seen.clear()
    odd = Samples(images[:49], {"y": torch.arange(49)})
    fit(Notes(), odd, Training(epochs=1, batch=16), CPU, seed=0, stage="x")
    assert len(seen) == 49  # none is left over for a batch of its own, which would have no variance
    seen.clear()
    alone = Samples(images, {"y": torch.arange(50)}, weights=(torch.arange(50) == 3).float())
    fit(Notes(), alone, Training(epochs=1, batch=16), CPU, seed=0, stage="x")
    assert not seen


def test_no_epoch_ends_with_a_batch_of_a_few_images(tiny: Tiny) -> None:
    sizes: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            sizes.append(len(x))
            return {"loss": self.weight.square()}

    schedule = Training(epochs=1, batch=32)
    fit(Counting(), Samples(tiny.train.images[:67]), schedule, CPU, seed=0, stage="test")
    assert sizes == [23, 22, 22]
    sizes.clear()
    rare = torch.full((67,), 0.5).index_fill(0, torch.arange(1), 1)
    fit(
        Counting(),
        Samples(tiny.train.images[:67], weights=rare),
        schedule,
        CPU,
        seed=0,
        stage="test",
    )
    assert max(sizes) - min(sizes) <= 1
    assert 20 < sum(sizes) < 50


def test_each_epoch_sees_views_of_its_own() -> None:
    seen: list[Tensor] = []

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(x)
            return {"loss": self.weight * 1.0}

    ramp = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16).expand(8, 1, 16, 16)
    schedule = Training(epochs=2, batch=8, augment="crop")
    fit(Notes(), Samples(ramp), schedule, CPU, seed=0, stage="x")
    # The images are alike, so that only their views can tell the epochs apart.
    assert not torch.equal(seen[0], seen[1])
    assert len(seen[0].flatten(1).unique(dim=0)) > 3


class Falling(nn.Module):
    """A network whose loss is not a number wherever image 70 is, from the `start`-th step on."""

    def __init__(self, tiny: Tiny, start: int) -> None:
        super().__init__()
        self.inner, self.start, self.batches = Supervised(fresh(tiny)), start, []

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Tensor]:
        self.batches.append(index.tolist())
        loss = self.inner(x, y)["loss"]
        if len(self.batches) > self.start:
            loss = loss + torch.where(index == 70, torch.nan, 0.0).sum()
        return {"loss": loss}


def test_a_loss_that_is_not_finite_stops_the_training_at_the_step_before(
    tiny: Tiny, tmp_path: Path
) -> None:
    assert tiny.train.labels is not None
    targets = {"y": tiny.train.labels[:150], "index": torch.arange(150)}
    samples = Samples(tiny.train.images[:150], targets)
    schedule = Training(epochs=4, batch=32, lr=0.1)
    file, state = tmp_path / "checkpoint.safetensors", tmp_path / ".failed.safetensors"
    module = Falling(tiny, start=5)  # the second epoch
    with pytest.raises(ForeshotError, match="^student: the loss became nan at step ") as caught:
        fit(module, samples, schedule, CPU, seed=5, stage="student", checkpoint=file)
    step = next(i for i, batch in enumerate(module.batches[5:]) if 70 in batch)
    assert f"at step {step + 1} of epoch 2, images " in str(caught.value)
    assert ", ... of the set; lower the learning rate (lr 0.1) or look" in str(caught.value)
    assert str(state) in str(caught.value)
    assert read_tensors(file)[1]["epochs"] == 1
    tensors, about = read_tensors(state)
    assert about == {"epochs": 1, "step": step, "batch": module.batches[5 + step]}
    # The weights are those of a training that ended there.
    twin = Falling(tiny, start=99)

    def stop(event: Event) -> None:
        if event.kind == "advance" and len(twin.batches) == 5 + step:
            raise Killed

    with pytest.raises(Killed):
        fit(twin, samples, schedule, CPU, seed=5, stage="student", listener=stop)
    for name, parameter in twin.named_parameters():
        assert torch.equal(tensors[f"module.{name}"], parameter), name
    with pytest.raises(ForeshotError, match=r"look at these images$"):
        fit(Falling(tiny, start=0), samples, schedule, CPU, seed=5, stage="student")


@pytest.mark.parametrize(
    ("progress", "lr"),
    [(0, 0), (0.125, 0.1), (0.25, 0.2), (0.4375, 0.1707106781), (0.625, 0.1), (1, 0)],
)
def test_the_learning_rate_rises_linearly_and_falls_by_a_cosine(progress: float, lr: float) -> None:
    assert Training(lr=0.2, warmup=0.25).lr_at(progress) == pytest.approx(lr, abs=1e-9)


def test_at_milestones_the_learning_rate_falls_to_a_tenth() -> None:
    """The schedule of Tian et al. (2020) on CIFAR-100: 240 epochs, tenths at 150, 180 and 210."""
    schedule = Training(epochs=240, lr=0.05, warmup=0, milestones=(150 / 240, 180 / 240, 210 / 240))
    rates = [schedule.lr_at(epoch / 240) for epoch in (0, 149.9, 150, 179.9, 180, 209.9, 210, 240)]
    expected = [0.05, 0.05, 0.005, 0.005, 5e-4, 5e-4, 5e-5, 5e-5]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert Training(lr=0.2, warmup=0.5, milestones=(0.75,)).lr_at(0.25) == pytest.approx(0.1)


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert Training(lr=0.3, warmup=0).lr_at(0) == 0.3


@pytest.mark.parametrize(
    "field", [{"epochs": 0}, {"batch": 1}, {"lr": 0}, {"warmup": 1}, {"momentum": 1}, {"x": 1}]
)
def test_a_schedule_that_makes_no_sense_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Training(**field)


# Augmentation ------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(4, 20), st.integers(4, 20))


def pictures(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def windows(image: Tensor) -> list[Tensor]:
    """All crops of an image that is reflected by an eighth of its sides, at least a pixel."""
    height, width = image.shape[1:]
    top, left = max(height // 8, 1), max(width // 8, 1)
    whole = nn.functional.pad(image[None].double(), (left, left, top, top), "reflect")[0]
    return [
        whole[:, y : y + height, x : x + width].to(torch.uint8)
        for y in range(2 * top + 1)
        for x in range(2 * left + 1)
    ]


@given(shape=shapes, seed=st.integers(0, 99), flip=st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_view_is_a_crop_of_the_reflected_image(
    shape: tuple[int, int, int, int], seed: int, flip: bool
) -> None:
    images = pictures(shape, seed)
    kind = "crop_flip" if flip else "crop"
    views = augment(images, kind, torch.Generator().manual_seed(seed))
    assert views.dtype == torch.uint8
    assert views.shape == images.shape
    for image, view in zip(images, views, strict=True):
        crops = windows(image)
        if flip:
            crops = crops + [crop.flip(2) for crop in crops]
        assert any(torch.equal(view, crop) for crop in crops)


@given(shape=shapes, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_views_follow_from_the_generator_alone(shape: tuple[int, int, int, int], seed: int) -> None:
    images = pictures(shape, seed)
    before = images.clone()
    state = torch.get_rng_state()
    for kind in ("crop", "crop_flip", "strong"):
        one, two = (augment(images, kind, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.dtype == torch.uint8
    assert augment(images, "none", torch.Generator()) is images
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_views_are_spread_evenly() -> None:
    ramp = torch.arange(16 * 16).reshape(1, 1, 16, 16).to(torch.uint8).expand(4000, 1, 16, 16)
    views = augment(ramp, "crop_flip", torch.Generator().manual_seed(0)).flatten(1)
    kinds, counts = views.unique(dim=0, return_counts=True)
    assert len(kinds) == 50  # 5 x 5 places, mirrored or not
    assert counts.min() > 40
    assert counts.max() < 130


def test_strong_views_have_a_grey_hole_and_another_light() -> None:
    images = torch.full((200, 1, 16, 16), 60, dtype=torch.uint8)
    views = augment(images, "strong", torch.Generator().manual_seed(0))
    holes = (views == 128).flatten(1).sum(1)
    assert holes.max() <= 64
    assert holes.min() >= 16
    light = views.masked_fill(views == 128, 0).amax((1, 2, 3))
    assert light.min() >= 36
    assert light.max() <= 84
    assert light.unique().numel() > 30
