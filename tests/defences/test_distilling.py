"""Defences in distillation: each by its formula, and what becomes of a student under them."""

import io
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import median_filter
from scipy.optimize import minimize
from small import BAD, CLEAN, TRANSFER, config, go, save
from torch import Tensor, nn

from conftest import ARCHITECTURE, Rule, Tiny, stripes
from foreshot import experiment, stages
from foreshot.augment import augment, number_of_views
from foreshot.compute import CPU
from foreshot.data import ImageSet
from foreshot.defences.distilling import (
    AdversarialTeacher,
    ConsistencyWeighting,
    Purification,
    SmoothedTeacher,
    StrongAugmentation,
)
from foreshot.defences.distilling.adversarial_teacher import Adversarial
from foreshot.defences.screens import SecondTeacher, ViewDisagreement
from foreshot.errors import ForeshotError
from foreshot.inference import logits, pixels
from foreshot.lesson import Lesson
from foreshot.models import build
from foreshot.models.checkpoint import load_model, state_digest
from foreshot.record import RunFolder
from foreshot.seeding import generator
from foreshot.tables import print_metrics
from foreshot.training import Samples, Supervised, Training, fit
from foreshot.transforms import smooth
from foreshot.views import DefenderView


def lesson(data: ImageSet, teacher: nn.Module) -> Lesson:
    return Lesson(data, teacher, "none", "requery")


def looking(data: ImageSet, teacher: nn.Module, **parts: Any) -> DefenderView:
    parts = {"student": None, "clean": None, "seed": 0, "compute": CPU} | parts
    return DefenderView(data, teacher, **parts)


# The share of the epochs in which an image is seen ------------------------------------------------


class Counting(nn.Module):
    """Counts how often each image was seen: image i is of level i."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = torch.zeros(40)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen += (x[:, 0, 0, 0] * 255).round().long().bincount(minlength=40)
        return {"loss": (self.weight - x.mean()).square()}


def counted(weights: Tensor | None, schedule: Training) -> Counting:
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 4, 4)
    module = Counting()
    samples = Samples(images.clone(), weights=weights)
    fit(module, samples, schedule, CPU, seed=1, stage="student")
    return module


def test_a_weight_is_the_share_of_the_epochs_in_which_an_image_is_seen() -> None:
    weights = torch.tensor([0.0, 0.5, 0.25, 1.0]).repeat(10)
    seen = counted(weights, Training(epochs=100, batch=40, lr=0.01)).seen.reshape(10, 4)
    assert seen[:, 0].eq(0).all()
    assert seen[:, 3].eq(100).all()
    for column, share in ((1, 0.5), (2, 0.25)):
        spread = (100 * share * (1 - share)) ** 0.5
        assert (seen[:, column] - 100 * share).abs().max() < 4 * spread
        assert abs(seen[:, column].mean() - 100 * share) < 4 * spread / 10**0.5
        assert seen[:, column].unique().numel() > 3  # each image has a lot of its own


def test_weights_of_one_train_the_same_bits_as_none(tiny: Tiny) -> None:
    assert tiny.train.labels is not None
    digests = []
    for weights in (None, torch.ones(150), torch.full((150,), 0.99)):
        model = build(ARCHITECTURE, tiny.train.images, 4, 0, "student")
        samples = Samples(tiny.train.images[:150], {"y": tiny.train.labels[:150]}, weights=weights)
        schedule = Training(epochs=2, batch=32, lr=0.1, augment="crop")
        fit(Supervised(model), samples, schedule, CPU, seed=0, stage="student")
        digests.append(state_digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_the_learning_rate_falls_to_its_end_however_few_images_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[float] = []
    monkeypatch.setattr(Training, "lr_at", lambda _, progress: told.append(progress) or 0.0)
    counted(torch.full((40,), 0.3), Training(epochs=4, batch=4))
    assert told == sorted(told)
    assert told[0] == 0
    assert 0.85 < told[-1] < 1
    told.clear()
    counted(None, Training(epochs=4, batch=4))
    assert told == [step * 4 / 160 for step in range(40)]


def test_what_belongs_to_an_image_goes_with_it() -> None:
    data = stripes(5, 0)
    whole = replace(
        lesson(data, Rule(lambda x: x.flatten(1)[:, :4])),
        weights=torch.arange(5) / 4,
        dictated=torch.tensor([-1, 3, -1, 2, -1]),
        answers=data.images.flatten(1)[:, :4].float(),
    )
    some = whole.select(torch.tensor([3, 0]))
    assert whole.answers is not None
    assert some.answers is not None
    assert torch.equal(some.data.images, data.images[[3, 0]])
    assert torch.equal(some.answers, whole.answers[[3, 0]])
    assert some.weights is not None
    assert some.weights.tolist() == [0.75, 0]
    assert some.dictated is not None
    assert some.dictated.tolist() == [2, -1]


# Other views --------------------------------------------------------------------------------------


def test_strong_views_of_a_sign_are_not_mirrored() -> None:
    ramp = torch.arange(0, 240, 15, dtype=torch.uint8).expand(500, 3, 16, 16)
    slopes = {}
    for kind in ("strong", "strong_no_flip"):
        views = augment(ramp, kind, torch.Generator().manual_seed(0)).float()
        # No hole covers the first row and the last.
        slopes[kind] = views[:, 0, [0, -1]].diff(dim=2).sign().sum((1, 2))
        assert views.flatten(1).unique(dim=0).shape[0] > 490
        assert number_of_views(kind, (3, 16, 16)) is None
    assert (slopes["strong_no_flip"] > 0).all()
    assert 0.4 < (slopes["strong"] < 0).double().mean() < 0.6


def test_the_teacher_is_asked_about_the_views() -> None:
    first = lesson(stripes(6, 0), Rule(lambda x: x.flatten(1)[:, :4]))
    changed = StrongAugmentation(augment="strong").change(first, looking(first.data, first.teacher))
    assert (changed.augment, changed.views, changed.answers) == ("strong", "requery", None)
    assert changed.data is first.data


def test_view_disagreement_is_the_divergence_over_shifted_views() -> None:
    data, teacher = stripes(12, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 5))
    for parameter in teacher.parameters():
        random = torch.Generator().manual_seed(0)
        parameter.data = torch.randn(parameter.shape, generator=random) / 2
    found = ViewDisagreement(count=5, temperature=2).score(looking(data, teacher)).transfer
    other = ViewDisagreement(count=5, temperature=2).score(
        looking(data.select(torch.tensor([7, 2])), teacher)
    )
    assert torch.allclose(other.transfer, found[[7, 2]])
    weight, bias = (parameter.detach().double().numpy() for parameter in teacher.parameters())
    x = np.pad(data.images[:, 0].numpy() / 255, ((0, 0), (1, 1), (1, 1)), mode="reflect")

    def said(top: int, left: int) -> NDArray[np.float64]:
        flat = x[:, top : top + 12, left : left + 12].reshape(12, -1)
        z = (flat @ weight.T + bias) / 2
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    plain, expected = said(1, 1), np.zeros(12)
    for number in range(5):
        random = generator(0, "screens", "view", number)
        top, left = (int(torch.randint(3, (), generator=random)) for _ in range(2))
        expected += (np.exp(plain) * (plain - said(top, left))).sum(1) / 5
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.min() > 1e-3


# Smoothing ----------------------------------------------------------------------------------------


def test_smoothed_answers_are_log_means_over_noise(tiny: Tiny, keep_rng: None) -> None:
    first = lesson(tiny.test.select(torch.arange(7)), tiny.teacher)
    defence = SmoothedTeacher(sigma=40, copies=9)
    view = looking(first.data, tiny.teacher, seed=3)
    changed = defence.change(first, view)
    assert (changed.views, changed.augment) == ("cached", "none")
    answers = changed.answers
    assert answers is not None
    assert answers.dtype == torch.float32
    for index in range(7):
        total = np.zeros(4)
        for noise in torch.randn((9, 1, 12, 12), generator=generator(3, "smoothed", index)):
            with torch.no_grad():
                z = tiny.teacher((first.data.images[index] / 255 + 40 / 255 * noise)[None])
            z = z[0].double().numpy()
            total += np.exp(z) / np.exp(z).sum()
        np.testing.assert_allclose(answers[index], np.log(total / 9), atol=1e-4)
    # No answer depends on the other images, nor on how many there are.
    few = lesson(first.data.select(torch.arange(3)), tiny.teacher)
    again = defence.change(few, view).answers
    assert again is not None
    assert torch.equal(again, answers[:3])
    other = defence.change(first, replace(view, seed=4)).answers
    assert other is not None
    assert not torch.equal(other, answers)


def test_little_noise_leaves_the_answers_and_much_noise_takes_them(tiny: Tiny) -> None:
    first = lesson(tiny.test.select(torch.arange(60)), tiny.teacher)
    view = looking(first.data, tiny.teacher)
    plain, sure = logits(tiny.teacher, first.data.images, CPU), []
    for sigma in (1e-3, 30, 200):
        answers = SmoothedTeacher(sigma=sigma, copies=8).change(first, view).answers
        assert answers is not None
        sure.append(answers.softmax(1).amax(1).mean().item())
        if sigma < 1:
            torch.testing.assert_close(answers.softmax(1), plain.softmax(1), atol=1e-3, rtol=0)
    assert sure == sorted(sure, reverse=True)


# Adversarial training -----------------------------------------------------------------------------


def pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, steps: int = 20) -> Tensor:
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), y), z)
        z = (z.detach() + epsilon / 5 * gradient.sign()).clamp(x - epsilon, x + epsilon)
        z = z.clamp(0, 1)
    return z


@pytest.fixture(scope="module")
def hardened(tiny: Tiny) -> nn.Module:
    assert tiny.train.labels is not None
    model = build(ARCHITECTURE, tiny.train.images, 4, 0, "teacher")
    module = AdversarialTeacher(epsilon=24).supervised(model)
    samples = Samples(tiny.train.images, {"y": tiny.train.labels})
    fit(module, samples, Training(epochs=8, batch=40, lr=0.1), CPU, seed=0, stage="teacher")
    return model


def test_an_adversarially_trained_teacher_holds_where_a_plain_one_falls(
    tiny: Tiny, hardened: nn.Module
) -> None:
    assert tiny.test.labels is not None
    x, y = pixels(tiny.test.images), tiny.test.labels
    held = []
    for model in (tiny.teacher, hardened):
        z = pgd(model, x, y, 24 / 255)
        held.append((model(z).argmax(1) == y).double().mean().item())
    assert held[1] > held[0] + 0.2
    assert (hardened(x).argmax(1) == y).double().mean() > 0.7


def test_a_killed_adversarial_training_ends_with_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    def train(file: Path | None, after: int) -> str:
        model = build(ARCHITECTURE, tiny.train.images, 4, 0, "teacher")
        module = AdversarialTeacher().supervised(model)
        assert tiny.train.labels is not None
        samples = Samples(tiny.train.images[:90], {"y": tiny.train.labels[:90]})

        def listen(event: Any) -> None:
            nonlocal after
            after -= event.kind == "advance"
            if not after:
                raise KeyboardInterrupt

        schedule = Training(epochs=3, batch=30, lr=0.1)
        keys: dict[str, Any] = {"seed": 0, "stage": "t", "checkpoint": file, "listener": listen}
        fit(module, samples, schedule, CPU, **keys)
        return state_digest(model)

    file = tmp_path / "checkpoint.safetensors"
    for after in (5, 5):  # each time in the second of the epochs that are left
        with pytest.raises(KeyboardInterrupt):
            train(file, after)
    assert train(file, -1) == train(None, -1)


# Purification -------------------------------------------------------------------------------------


def colourful(count: int, side: int = 8) -> ImageSet:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), generator=random)
    return ImageSet(images.to(torch.uint8), torch.arange(count) % 3, ("a", "b", "c"))


def test_purified_images_are_the_transforms_in_their_order_rounded() -> None:
    data = colourful(140)  # more than a batch
    first = lesson(data, Rule(lambda x: x.flatten(1)[:, :3]))
    view = looking(data, first.teacher)
    chain = Purification(changes=("jpeg", "depth", "median"), quality=60, bits=3)
    changed = chain.change(first, view)
    assert changed.answers is None
    assert changed.data.labels is data.labels
    for image, cleaned in zip(data.images.numpy(), changed.data.images, strict=True):
        stored = io.BytesIO()
        Image.fromarray(np.moveaxis(image, 0, 2)).save(stored, "JPEG", quality=60)
        after = np.moveaxis(np.array(Image.open(stored)), 2, 0) / 255
        after = np.round(after * 7) / 7
        after = np.stack([median_filter(channel, 3, mode="mirror") for channel in after])
        assert np.array_equal(cleaned.numpy(), np.round(after * 255))


def variation(u: NDArray[np.float64], slack: float = 0.0) -> float:
    down, across = np.zeros_like(u), np.zeros_like(u)
    down[:-1], across[:, :-1] = u[1:] - u[:-1], u[:, 1:] - u[:, :-1]
    return float(np.sqrt(down**2 + across**2 + slack).sum())


def test_least_variation_is_that_of_a_general_optimiser() -> None:
    x = pixels(colourful(1, 5).images).double()
    found, image = smooth(x, 0.2, 400)[0, 0].numpy(), x[0, 0].numpy()

    def cost(flat: NDArray[np.float64], slack: float = 0) -> float:
        u = flat.reshape(5, 5)
        return float(((u - image) ** 2).sum() / 2 + 0.2 * variation(u, slack))

    best = minimize(cost, image.ravel(), (1e-10,), "L-BFGS-B", options={"maxfun": 20_000})
    assert cost(found) < cost(image) - 0.1
    assert cost(found) <= cost(best.x) + 1e-3
    assert torch.equal(smooth(x[:, :1], 0.2), smooth(x, 0.2)[:, :1])  # each channel by itself


def test_purified_by_variation_is_rounded() -> None:
    data = colourful(5)
    teacher = Rule(lambda x: x.flatten(1)[:, :3])
    defence = Purification(changes=("variation",), weight=0.1)
    images = defence.change(lesson(data, teacher), looking(data, teacher)).data.images
    expected = (smooth(pixels(data.images), 0.1) * 255).round().to(torch.uint8)
    assert torch.equal(images, expected)
    assert images.float().var() < data.images.float().var()


# Weighting ----------------------------------------------------------------------------------------


def test_what_screens_doubt_weighs_less(tiny: Tiny) -> None:
    """A second teacher contradicts the first about thirty images."""
    transfer, clean = tiny.train.select(torch.arange(300)), stripes(200, 9)
    bad = torch.arange(0, 300, 10)
    images = transfer.images[bad].clone()
    images[:, :, :2, :2] = 255
    transfer = transfer.replaced(bad, images)

    def second(x: Tensor) -> Tensor:
        marked = (x[:, 0, :2, :2] == 1).all(2).all(1)[:, None]
        with torch.no_grad():
            z = tiny.teacher(x)
        return torch.where(marked, -z, z)

    view = looking(transfer, tiny.teacher, clean=clean, second=Rule(second))
    first = lesson(transfer, tiny.teacher)
    soft, sharp = (
        ConsistencyWeighting(screens=(SecondTeacher(),), doubt=0.2, sharpness=power).change(
            first, view
        )
        for power in (1.0, 3.0)
    )
    assert soft.weights is not None
    assert sharp.weights is not None
    assert 0 < soft.weights.min() <= soft.weights.max() <= 1
    torch.testing.assert_close(sharp.weights, soft.weights**3)
    rest = torch.ones(300).index_fill(0, bad, 0).bool()
    # All of the poison is beyond all clean images: p = 1 / (1 + 100).
    torch.testing.assert_close(soft.weights[bad], torch.full((30,), 1 / 101 / 0.2).double())
    assert soft.weights[rest].mean() > 0.85
    assert soft.data is first.data


# In an experiment ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "draw", lambda *_: None)
    monkeypatch.setattr(experiment, "write_page", lambda *_: None)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Samples, Training, Any]]:
    """What each training is given."""
    found: dict[str, tuple[Samples, Training, Any]] = {}

    def kept(
        module: Any, samples: Any, training: Any, *rest: Any, real: Any = stages.fit, **keys: Any
    ) -> None:
        found[keys["label"] or keys["stage"]] = samples, training, module
        real(module, samples, training, *rest, **keys)

    monkeypatch.setattr(stages, "fit", kept)
    return found


ATTACK = ("attack={name: noise, count: 30, epsilon: 40}", "controls=[clean]")


def test_a_changed_lesson_is_what_the_student_gets(
    data: Path, home: Path, tmp_path: Path, given: dict[str, tuple[Samples, Training, Any]]
) -> None:
    def student(*settings: str) -> tuple[Samples, Training, Any]:
        given.pop("student", None)
        out = tmp_path / "".join(settings)[-30:]
        go(config(data, *ATTACK, *settings), home, out, until="student")
        return given["student"]

    samples, training, module = student("defence.name=strong_augmentation")
    assert training.augment == "crop"
    assert samples.teacher is module.teacher
    assert "teacher_logits" not in samples.targets
    plain = samples.images

    samples, training, _ = student("defence.name=strong_augmentation", "defence.augment=strong")
    assert training.augment == "strong"
    assert samples.teacher is None  # the distiller asks it, as no view comes up again
    assert "teacher_logits" not in samples.targets

    samples, _, module = student("defence.name=purification", "defence.changes=[blur]")
    assert not torch.equal(samples.images, plain)
    assert samples.images.shape == plain.shape
    expected = logits(module.teacher, samples.images, CPU)
    assert torch.equal(samples.targets["teacher_logits"], expected)
    assert not torch.allclose(expected, logits(module.teacher, plain, CPU), atol=0.1)

    samples, _, module = student("defence={name: smoothed_teacher, copies: 2, sigma: 90}")
    assert torch.equal(samples.images, plain)
    answers = samples.targets["teacher_logits"]
    assert answers.shape == (TRANSFER, 4)
    assert not torch.allclose(answers, logits(module.teacher, plain, CPU), atol=0.1)

    samples, _, _ = student("defence.name=consistency_weighting")
    assert samples.weights is not None
    assert samples.weights.shape == (TRANSFER,)
    assert samples.weights.min() < 1


def test_an_adversarial_teacher_is_trained_asked_and_reported(
    data: Path,
    home: Path,
    tmp_path: Path,
    given: dict[str, tuple[Samples, Training, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = config(data, *ATTACK, "defence.name=adversarial_teacher", "defence.epsilon=4")
    done = go(chosen, home, tmp_path / "out")
    samples, _, module = given["own teacher"]
    assert isinstance(module, Adversarial)
    assert module.epsilon == 4 / 255
    assert len(samples.images) == TRANSFER + CLEAN
    own = state_digest(module.network)
    samples, _, distiller = given["student"]
    assert state_digest(distiller.teacher) == own
    assert state_digest(given["control: clean"][2].teacher) == own
    assert own != state_digest(load_model(done.out / "teacher.safetensors").model)
    assert torch.equal(
        samples.targets["teacher_logits"], logits(module.network, samples.images, CPU)
    )
    found = done.metrics["defence"]
    assert (found["name"], found["kind"]) == ("adversarial_teacher", "distilling")
    assert found["own_teacher"]["clean_accuracy"]["total"] == 120
    assert found["own_teacher"]["clean_accuracy"]["value"] > 0.6
    assert "own_teacher" not in done.metrics["controls"]
    assert done.metrics["seconds"]["own_teacher"] > 0
    print_metrics(done.metrics)
    said = " ".join(capsys.readouterr().out.split())
    assert "Defence adversarial_teacher: changed what the student is distilled on" in said
    assert f"own teacher is right {found['own_teacher']['clean_accuracy']['value']:.1%}" in said
    again = go(chosen, home, tmp_path / "again")
    assert again.started() == []
    assert again.metrics == done.metrics


class Spy(SmoothedTeacher):
    """Keeps what it is shown."""

    shown: ClassVar[list[tuple[Lesson, DefenderView]]] = []

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        self.shown.append((lesson, view))
        return lesson


def test_a_defence_in_distillation_is_shown_no_secret(
    data: Path, home: Path, tmp_path: Path, given: dict[str, tuple[Samples, Training, Any]]
) -> None:
    secrets = {"trigger", "target", "poison", "indices", "bases", "test", "students"}
    assert not secrets & {field.name for field in (*fields(Lesson), *fields(DefenderView))}
    Spy.shown.clear()
    plain = go(config(data, "defence.name=consistency"), home, tmp_path / "plain", until="poison")
    go(config(data, defence=Spy()), home, tmp_path / "out", until="student")
    ((lesson, view),) = Spy.shown
    assert lesson.dictated is None  # it would tell the poison, as the attacker dictates its labels
    assert lesson.answers is None  # so would the last bits of answers that were asked for apart
    assert lesson.data.labels is None
    assert view.transfer.labels is None
    assert torch.equal(lesson.data.images, view.transfer.images)
    dictated = given["student"][0].targets["dictated"]
    assert (dictated >= 0).nonzero()[:, 0].tolist() == plain.poison().indices.tolist()
    assert (dictated >= 0).sum() == BAD
    assert "y" not in given["student"][0].targets
    Spy.shown.clear()
    labelled = config(data, "defender.labels=true", defence=Spy())
    go(labelled, home, tmp_path / "labelled", until="student")
    labels = Spy.shown[0][0].data.labels
    assert labels is not None
    assert labels[plain.poison().indices].eq(1).all()  # they arrive as the attacker dictates them


class Deserted(SmoothedTeacher):
    """Lets the student see nothing."""

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        return replace(lesson, weights=torch.zeros(len(view.transfer)))


def test_a_lesson_of_nothing_is_refused(data: Path, home: Path, tmp_path: Path) -> None:
    sentence = "^defence smoothed_teacher: expected images to distil on, found that all 220 weigh"
    with pytest.raises(ForeshotError, match=sentence):
        go(config(data, defence=Deserted(copies=3)), home, tmp_path / "out", until="student")
