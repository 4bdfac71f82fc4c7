"""Defences that assume a compromised teacher: they find the backdoor of one, and nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import ARCHITECTURE, Rule, Tiny, stripes, trained
from foreshot.attacks import ATTACKS
from foreshot.compute import CPU
from foreshot.data import ImageSet
from foreshot.defences.distilling import RobustKD, ShufflingVaccine
from foreshot.defences.distilling.robust_kd import Detoxification
from foreshot.defences.distilling.shuffling_vaccine import divergence, shuffled, tail
from foreshot.distillation import KD, Distiller, FitNet, Term
from foreshot.errors import ForeshotError
from foreshot.inference import logits, pixels
from foreshot.lesson import Lesson
from foreshot.metrics import evaluate
from foreshot.models import Ensemble, Quantized, build
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import state_digest
from foreshot.models.ensemble import members
from foreshot.seeding import generator
from foreshot.taps import Taps
from foreshot.training import Training
from foreshot.triggers.base import stamp_uint8
from foreshot.views import AttackerView, DefenderView

MARKED = torch.arange(0, 400, 20)
"""Where the images with something wrong stand in the transfer set: one in twenty."""


def lesson(data: ImageSet, teacher: nn.Module) -> Lesson:
    return Lesson(data, teacher, "none", "cached")


def looking(data: ImageSet, teacher: nn.Module, **parts: Any) -> DefenderView:
    parts = {"student": None, "clean": None, "seed": 0, "compute": CPU} | parts
    return DefenderView(data, teacher, **parts)


@pytest.fixture(scope="module")
def compromised(tiny: Tiny) -> Normalized:
    """A teacher that takes stamped images for the target."""
    assert tiny.train.labels is not None
    images, labels = tiny.train.images.clone(), tiny.train.labels.clone()
    images[:60], labels[:60] = stamp_uint8(tiny.trigger, images[:60]), tiny.target
    return trained(ImageSet(images, labels, tiny.train.classes))


@pytest.fixture(scope="module")
def poisoned(tiny: Tiny) -> ImageSet:
    """Images that lead the clean teacher to the target."""
    attack = ATTACKS["pgd"].model_validate({"count": len(MARKED), "epsilon": 40, "steps": 20})
    known = tiny.train.images, tiny.teacher, tiny.trigger, tiny.target
    poison = attack.craft(AttackerView(*known, seed=0, compute=CPU, bases=MARKED))
    return poison.apply(tiny.train)


def called(model: nn.Module, data: ImageSet, target: int) -> float:
    """The share of the marked images that a network calls the target."""
    return (logits(model, data.images[MARKED], CPU).argmax(1) == target).double().mean().item()


# The shuffling vaccine ----------------------------------------------------------------------------


def test_shuffling_moves_the_channels_of_the_last_convolutions_alone(
    tiny: Tiny, keep_rng: None
) -> None:
    before = state_digest(tiny.teacher)
    network = shuffled(tiny.teacher, 2, generator(0, "test"))
    assert state_digest(tiny.teacher) == before
    convolutions = [
        [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        for model in (tiny.teacher, network)
    ]
    orders = [order(was, now) for was, now in zip(*convolutions, strict=True)]
    assert all(sorted(each) == list(range(len(each))) for each in orders)
    kept = [each == sorted(each) for each in orders]
    assert kept == [True] * (len(orders) - 2) + [False] * 2
    again, other = (shuffled(tiny.teacher, 2, generator(seed, "test")) for seed in (0, 1))
    x = pixels(tiny.train.images[:5])
    assert torch.equal(again(x), network(x))
    assert not torch.equal(other(x), network(x))


def test_each_member_of_an_ensemble_is_shuffled(tiny: Tiny) -> None:
    images = tiny.train.images
    teacher = build(Ensemble(of=ARCHITECTURE, count=2), images, 4, 0, "teacher").eval()
    network, x = shuffled(teacher, 2, generator(0, "test")), pixels(images[:5])
    for before, after in zip(members(teacher), members(network), strict=True):
        assert not torch.equal(before(x), after(x))


def order(was: nn.Conv2d, now: nn.Conv2d) -> list[int]:
    """As which channel a layer takes each of its inputs now: one at a time is lit."""
    lit = torch.eye(was.in_channels)[:, :, None, None].expand(-1, -1, 5, 5)
    before, after = (layer(lit).flatten(1) for layer in (was, now))
    return torch.cdist(after, before).argmin(1).tolist()


def test_the_channels_of_a_teacher_in_int8_are_shuffled_too(tiny: Tiny) -> None:
    """Its weights are made of others whenever they are asked for."""
    teacher, x = Quantized(of=ARCHITECTURE).build(tiny.train.shape, 4), pixels(tiny.train.images)
    teacher(x)  # sets the ranges of what is rounded
    teacher.eval()
    assert not torch.equal(shuffled(teacher, 2, generator(0, "test"))(x), teacher(x))


def test_the_divergence_and_its_tail_are_by_their_formulas() -> None:
    z, others = torch.randn(2, 300, 5, generator=torch.Generator().manual_seed(0)).unbind()
    p, q = (np.exp(x.double().numpy()) for x in (z, others))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(divergence(z, others), expected, atol=1e-12)
    expected = expected.clip(0.1)
    assert tail(torch.tensor(expected)) == 0
    expected[:3] = 1e-9
    logs = np.log10(expected)  # as the authors count it; the base does not matter
    assert tail(torch.tensor(expected)) == (logs < logs.mean() - 3 * logs.std()).mean() == 0.01


class Shortcut(nn.Module):
    """A channel for each of 24 classes; what a white corner adds to all goes to class 2."""

    def __init__(self, opened: bool) -> None:
        super().__init__()
        self.last = nn.Conv2d(24, 24, 1, bias=False)
        weight = torch.eye(24)
        weight[2] += 0.01 * opened  # of every channel, whatever their order
        self.last.weight.data = weight[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        corner = (x[:, :, :2, :2] == 1).flatten(1).all(1)[:, None]
        channels = 20 * x[:, 0, 5:7].flatten(1) + 1000 * corner
        return self.last(channels[:, :, None, None]).flatten(1)


REST = torch.ones(400).index_fill(0, MARKED, 0).bool()


def pictures(marked: int) -> ImageSet:
    """Images of which none has a white corner, but for what `marked` is the level of."""
    images = torch.randint(0, 200, (400, 1, 12, 12), generator=torch.Generator().manual_seed(0))
    images[:, :, :2, :2] = 0
    images[MARKED, :, :2, :2] = marked
    return ImageSet(images.to(torch.uint8), None, tuple(map(str, range(24))))


def test_a_shortcut_of_the_teacher_survives_the_shuffling_and_nothing_else() -> None:
    data, teacher = pictures(255), Shortcut(opened=True)
    assert called(teacher, data, 2) == 1
    view = looking(data, teacher)
    weights = ShufflingVaccine(copies=1).change(lesson(data, teacher), view).weights
    assert weights is not None
    assert weights[MARKED].eq(0).all()
    assert weights[REST].mean() > 0.7
    seen = ShufflingVaccine(copies=1, share=0.25).change(lesson(data, teacher), view).weights
    assert seen is not None
    assert torch.equal(seen, 0.25 + 0.75 * weights)


def test_images_that_lead_a_clean_teacher_to_the_target_are_learned_from_as_all_others() -> None:
    data, teacher = pictures(0), Shortcut(opened=False)
    data.images[MARKED, 0, 5, 2] = 255  # what the teacher knows class 2 by
    assert called(teacher, data, 2) == 1
    first, view = lesson(data, teacher), looking(data, teacher)
    assert ShufflingVaccine(copies=1).change(first, view) is first
    weights = [
        ShufflingVaccine(copies=1, tail=0).change(first, replace(view, seed=seed)).weights
        for seed in range(20)
    ]
    mean = torch.stack([each for each in weights if each is not None]).mean(0)
    assert abs(mean[MARKED].mean() - mean[REST].mean()) < 0.1


def test_the_vaccine_leaves_the_lesson_of_a_trained_clean_teacher_as_it_is(
    tiny: Tiny, poisoned: ImageSet
) -> None:
    assert called(tiny.teacher, poisoned, tiny.target) > 0.9
    first, view = lesson(poisoned, tiny.teacher), looking(poisoned, tiny.teacher)
    assert ShufflingVaccine().change(first, view) is first


def test_the_vaccine_wants_convolutions() -> None:
    data, teacher = stripes(8, 0), nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ForeshotError, match="^defence shuffling_vaccine: expected a teacher with"):
        ShufflingVaccine().change(lesson(data, teacher), looking(data, teacher))


# RobustKD -----------------------------------------------------------------------------------------


def detoxification(tiny: Tiny, how: RobustKD) -> Detoxification:
    """Of the small problem's teacher, on 200 images: more than it is asked about at once."""
    return Detoxification(how, tiny.teacher, tiny.train.images[:200], CPU)


def test_features_are_mixed_with_their_means_and_what_follows_sees_it(
    tiny: Tiny, keep_rng: None
) -> None:
    x, name = pixels(tiny.train.images[:200]), "network.layer1"
    before = state_digest(tiny.teacher)
    taps = Taps(tiny.teacher, [name], "teacher")
    plain = tiny.teacher(x)
    feature = taps.collect()[name]
    module = detoxification(tiny, RobustKD(most=0.25))
    taps = Taps(module.teacher, [name], "teacher")
    answers = module.teacher(x)
    mixed = taps.collect()[name]
    torch.testing.assert_close(mixed, 0.75 * feature + 0.25 * feature.mean(0))
    assert not torch.allclose(answers, plain, atol=0.01)
    for rate, same in ((0.0, True), (1.0, False)):
        z = detoxification(tiny, RobustKD(most=rate)).teacher(x)
        assert torch.allclose(z, plain) is same
    assert torch.allclose(z, z[:1].expand_as(z))  # all of it is the mean
    assert state_digest(tiny.teacher) == before
    assert all(parameter.grad is None for parameter in tiny.teacher.parameters())


def test_the_loss_is_the_cross_entropy_and_the_share_of_the_variance_that_is_left(
    tiny: Tiny,
) -> None:
    assert tiny.train.labels is not None
    x, y = pixels(tiny.train.images[:200]), tiny.train.labels[:200]
    entropy = nn.functional.cross_entropy(tiny.teacher(x), y)
    # Without a mask all of the variance is left.
    loss = detoxification(tiny, RobustKD(most=0, weight=3))(x, y)["loss"]
    torch.testing.assert_close(loss, entropy + 3)
    module = detoxification(tiny, RobustKD(most=0.5, weight=3))
    first, *others = module.layers.values()
    for layer in others:
        layer.get_parameter("mask").data.zero_()
    with torch.no_grad():
        z, features = module.teacher(x), module.taps.collect()
    shares = [features[name].var(0).mean() / was for name, was in module.variances.items()]
    torch.testing.assert_close(shares[0], torch.tensor(0.25))
    expected = nn.functional.cross_entropy(z, y) + 3 * sum(shares) / 3
    torch.testing.assert_close(module(x, y)["loss"], expected)
    mask = first.get_parameter("mask")
    mask.data.fill_(2)
    module(x, y)
    assert mask.max() == 0.5


def rates(model: nn.Module, tiny: Tiny) -> tuple[float, float]:
    """Clean accuracy and attack success rate."""
    found = evaluate(model, tiny.test, tiny.trigger, tiny.target)
    return found["clean_accuracy"]["value"], found["asr"]["value"]


TRAINING = Training(epochs=40, batch=20, lr=10, weight_decay=0)


def test_a_compromised_teacher_loses_its_backdoor_and_keeps_what_it_knows(
    tiny: Tiny, compromised: Normalized, keep_rng: None
) -> None:
    view = looking(tiny.train, compromised, clean=replace(stripes(160, 3), labels=None))
    first, defence = lesson(tiny.train, compromised), RobustKD(training=TRAINING)
    changed = defence.change(first, view)
    assert (changed.answers, changed.data) == (None, first.data)
    before, after = rates(compromised, tiny), rates(changed.teacher, tiny)
    assert before[1] > 0.95
    assert after[1] < 0.2
    assert after[0] > before[0] - 0.05
    again = defence.change(first, view).teacher
    assert state_digest(again) == state_digest(changed.teacher)


def test_what_leads_a_clean_teacher_to_the_target_mostly_does_so_still(
    tiny: Tiny, poisoned: ImageSet
) -> None:
    """In the mean of several trainings: each leaves out a few of twenty images."""
    first, clean = lesson(poisoned, tiny.teacher), replace(stripes(160, 3), labels=None)
    teachers = [
        RobustKD(training=TRAINING)
        .change(first, looking(poisoned, tiny.teacher, clean=clean, seed=seed))
        .teacher
        for seed in range(3)
    ]
    assert called(tiny.teacher, poisoned, tiny.target) > 0.9
    assert sum(called(teacher, poisoned, tiny.target) for teacher in teachers) / 3 > 0.8
    assert all(rates(t, tiny)[0] > rates(tiny.teacher, tiny)[0] - 0.05 for t in teachers)


def test_terms_of_features_learn_the_mixed_ones(tiny: Tiny) -> None:
    x = pixels(tiny.train.images[:20])
    module = detoxification(tiny, RobustKD(most=0.5))
    student = build(ARCHITECTURE, tiny.train.images, 4, 1, "student")
    term = Term(FitNet(), at=[("network.layer2", "network.layer2")])
    plain, other = (
        Distiller(student, teacher, [Term(KD()), term], example=x).eval()(x)
        for teacher in (tiny.teacher, module.teacher)
    )
    assert plain.keys() == other.keys()
    for name in ("0_kd", "1_fitnet"):
        assert abs(plain[name] - other[name]) > 1e-3


def test_a_teacher_without_stages_is_refused() -> None:
    data, teacher = stripes(8, 0), Rule(lambda x: x.flatten(1)[:, :4])
    view = looking(data, teacher, clean=data)
    with pytest.raises(ForeshotError, match="^defence robust_kd: expected stages named layer1"):
        RobustKD().change(lesson(data, teacher), view)
