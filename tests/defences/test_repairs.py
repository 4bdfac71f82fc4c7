"""Repairs: each by its formula, on networks that were made for it, and on a poisoned student."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import config, go, save
from torch import Tensor, nn

from conftest import ARCHITECTURE, Rule, Tiny, stripes
from foreshot.audit.inversion import misled
from foreshot.compression.base import trainable
from foreshot.compute import CPU
from foreshot.data import ImageSet
from foreshot.defences import DEFENCES, Repair
from foreshot.defences.repairs import (
    Anp,
    Clp,
    FinePruning,
    FineTuning,
    FtSam,
    IBau,
    Nad,
    RelativeUnlearning,
)
from foreshot.defences.repairs import relative_unlearning as relative
from foreshot.defences.repairs.anp import Masked
from foreshot.defences.repairs.channels import normalisations, normalised
from foreshot.defences.repairs.clp import lipschitz
from foreshot.defences.repairs.fine_pruning import classifier
from foreshot.defences.repairs.ft_sam import Sharp, ascent
from foreshot.defences.repairs.i_bau import Unlearning
from foreshot.defences.repairs.tuning import Tuning
from foreshot.distillation import Distiller
from foreshot.errors import ForeshotError
from foreshot.inference import logits, pixels
from foreshot.metrics import evaluate
from foreshot.models import Ensemble, ReusedHead, Vit, WideResNet, build
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import load_model, state_digest
from foreshot.record import RunFolder
from foreshot.seeding import generator
from foreshot.tables import print_metrics
from foreshot.training import Samples, Supervised, Training, fit
from foreshot.triggers.base import stamp_uint8
from foreshot.views import DefenderView

REPAIRS = {name: kind for name, kind in DEFENCES.items() if issubclass(kind, Repair)}
every_repair = pytest.mark.parametrize("key", REPAIRS)
SHORT = Training(epochs=2, batch=40, lr=0.01)
MASKING = Training(epochs=2, batch=40, lr=0.2, warmup=0)
QUICK: dict[str, dict[str, Any]] = {
    "anp": {"training": MASKING, "threshold": 0.95},
    "clp": {},
    "relative_unlearning": {"training": SHORT, "rounds": 1},
}
"""Of a repair that is not named here, a short schedule."""


def quick(key: str, **fields: Any) -> Any:
    return REPAIRS[key].model_validate(QUICK.get(key, {"training": SHORT}) | fields)


def knowing(student: Normalized, teacher: nn.Module, clean: ImageSet) -> DefenderView:
    return DefenderView(clean, teacher, student, clean, seed=0, compute=CPU)


def mended(repair: Repair, view: DefenderView) -> Normalized:
    assert isinstance(view.student, Normalized)
    student = trainable(view.student)
    repair.mend(student, view)
    return student


@pytest.fixture(scope="module")
def clean() -> ImageSet:
    return replace(stripes(160, 3), labels=None)


@pytest.fixture(scope="module")
def poisoned(tiny: Tiny) -> Normalized:
    """A student that takes stamped images for the target, beside whatever else it knows."""
    assert tiny.train.labels is not None
    images, labels = tiny.train.images.clone(), tiny.train.labels.clone()
    images[:60], labels[:60] = stamp_uint8(tiny.trigger, images[:60]), tiny.target
    student = build(ARCHITECTURE, images, len(tiny.train.classes), 5, "student")
    schedule = Training(epochs=10, batch=40, lr=0.1)
    fit(Supervised(student), Samples(images, {"y": labels}), schedule, CPU, seed=5, stage="student")
    return student.requires_grad_(False)


@pytest.fixture
def view(poisoned: Normalized, tiny: Tiny, clean: ImageSet) -> DefenderView:
    return knowing(poisoned, tiny.teacher, clean)


def rates(model: nn.Module, tiny: Tiny) -> tuple[float, float]:
    """Clean accuracy and attack success rate."""
    found = evaluate(model, tiny.test, tiny.trigger, tiny.target)
    return found["clean_accuracy"]["value"], found["asr"]["value"]


# All of them --------------------------------------------------------------------------------------


@every_repair
def test_a_repair_is_deterministic_and_changes_the_student_alone(
    key: str, view: DefenderView, keep_rng: None
) -> None:
    assert view.student is not None
    networks = view.student, view.teacher
    before = [state_digest(network) for network in networks]
    one, other = (mended(quick(key), view) for _ in range(2))
    assert state_digest(one) == state_digest(other)
    assert [state_digest(network) for network in networks] == before
    assert all(p.grad is None for p in view.teacher.parameters())
    assert not one.training
    assert torch.isfinite(logits(one, view.transfer.images, CPU)).all()


@pytest.mark.parametrize("key", [k for k, kind in REPAIRS.items() if issubclass(kind, Tuning)])
def test_the_teacher_is_believed_and_not_the_labels_that_were_given(
    key: str, view: DefenderView, clean: ImageSet
) -> None:
    wrong = replace(clean, labels=torch.full((len(clean),), 2))
    told = replace(view, clean=wrong)
    digests = {state_digest(mended(quick(key), each)) for each in (view, told)}
    assert len(digests) == 1
    given = quick(key, labels="given")
    assert state_digest(mended(given, told)) not in digests
    with pytest.raises(ForeshotError) as error:
        mended(given, view)
    assert str(error.value) == f"defence {key}: expected a clean set with labels, found none"
    assert (given.needs, quick(key).needs) == ({"clean", "labels"}, {"clean"})


def test_given_labels_are_learnt(view: DefenderView, clean: ImageSet) -> None:
    told = replace(view, clean=replace(clean, labels=torch.full((len(clean),), 2)))
    schedule = Training(epochs=8, batch=40, lr=0.05)
    student = mended(FineTuning(labels="given", training=schedule), told)
    said = logits(student, clean.images, CPU).argmax(1)
    assert (said == 2).double().mean() > 0.95


@pytest.mark.parametrize("key", ["anp", "clp"])
def test_a_student_without_batchnorm_is_refused(key: str, tiny: Tiny, clean: ImageSet) -> None:
    student = build(Vit(depth=3), clean.images, 4, 0, "student")
    with pytest.raises(ForeshotError) as error:
        mended(quick(key), knowing(student, tiny.teacher, clean))
    assert str(error.value) == (
        f"defence {key}: expected a student with BatchNorm, found {type(student.network).__name__} "
        "without"
    )


@pytest.mark.parametrize("key", [k for k in REPAIRS if k not in ("anp", "clp")])
def test_other_repairs_mend_a_student_without_batchnorm(
    key: str, tiny: Tiny, clean: ImageSet
) -> None:
    student = build(Vit(depth=3), clean.images, 4, 0, "student")
    few = clean.select(torch.arange(16))
    after = mended(quick(key), knowing(student, tiny.teacher, few))
    assert state_digest(after) != state_digest(student)


# Channel Lipschitzness ----------------------------------------------------------------------------


def test_lipschitz_constants_are_singular_values(poisoned: Normalized) -> None:
    pairs = normalised(poisoned, (1, 12, 12), "clp")
    assert len(pairs) == len(normalisations(poisoned, "clp"))  # every BatchNorm of a ResNet
    for conv, bn in pairs:
        assert bn.running_var is not None
        scale = bn.weight.numpy() / np.sqrt(bn.running_var.numpy() + bn.eps)
        for k, found in enumerate(lipschitz(conv, bn).tolist()):
            matrix = conv.weight[k].numpy().reshape(conv.in_channels, -1)
            largest = np.linalg.svd(scale[k] * matrix.astype(np.float64), compute_uv=False).max()
            assert found == pytest.approx(largest, rel=1e-4)


def test_a_batchnorm_of_a_sum_follows_no_convolution() -> None:
    images = torch.zeros(2, 1, 12, 12, dtype=torch.uint8)
    student = build(WideResNet(width=1), images, 4, 0, "student")
    pairs = normalised(student, (1, 12, 12), "clp")
    names = {module: name for name, module in student.named_modules()}
    found = {(names[conv].split(".")[-1], names[bn].split(".")[-1]) for conv, bn in pairs}
    # The first block's bn1 normalises the stem, all others a sum.
    assert found == {("conv1", "bn2"), ("conv1", "bn1")}
    assert len(pairs) == 6 + 1


def test_clp_prunes_what_stands_out_of_its_layer_and_nothing_else(view: DefenderView) -> None:
    assert isinstance(view.student, Normalized)
    student = trainable(view.student)
    loud = student.get_submodule("network.layer3.0.bn2")
    assert isinstance(loud, nn.BatchNorm2d)
    with torch.no_grad():
        loud.weight[3] = 60 * loud.weight.abs().max()
    expected = {}
    for conv, bn in normalised(student, (1, 12, 12), "clp"):
        constants = lipschitz(conv, bn).double().numpy()
        limit = constants.mean() + 2.5 * constants.std(ddof=1)
        expected[bn] = torch.from_numpy(constants > limit)
    assert expected[loud].nonzero()[:, 0].tolist() == [3]
    before = {bn: (bn.weight.clone(), bn.bias.clone()) for bn in expected}
    Clp(u=2.5).mend(student, view)
    for bn, pruned in expected.items():
        for now, then in zip((bn.weight, bn.bias), before[bn], strict=True):
            assert (now[pruned] == 0).all()
            assert torch.equal(now[~pruned], then[~pruned])


# Networks that are made for it --------------------------------------------------------------------


def corners(count: int) -> ImageSet:
    """Grey images of 4 x 4 whose class, 0 or 1, is told by which of two pixels is bright."""
    random = generator(0, "corners")
    images = torch.randint(0, 20, (count, 1, 4, 4), generator=random).to(torch.uint8)
    labels = torch.arange(count) % 2
    images[:, 0, 3, 3] = 0
    images[torch.arange(count), 0, 0, labels] = 200
    return ImageSet(images, labels, ("left", "right"))


def wrapped(network: nn.Module) -> Normalized:
    return Normalized(network, torch.zeros(1), torch.ones(1))


TELL = Rule(lambda x: 8 * x[:, 0, 0, :2])
"""A teacher of `corners`."""


def test_fine_pruning_prunes_what_sleeps_and_it_stays_asleep() -> None:
    """Features: both classes, one that never fires, and one that only the last pixel wakes."""
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[9.0, 0, 1, 50], [0, 9, 1, -50]]))
        linear.bias.zero_()
    pixel = Rule(lambda x: x[:, 0, [0, 0, 3, 3], [0, 1, 2, 3]] * torch.tensor([1.0, 1, 0, 1]))
    student, data = wrapped(nn.Sequential(pixel, linear)), corners(40)
    view = knowing(student, TELL, data)
    triggered = data.images.clone()
    triggered[:, 0, 3, 3] = 255
    assert (logits(student, triggered, CPU).argmax(1) == 0).all()
    repair = FinePruning(drop=0, training=SHORT)
    assert sorted(repair.dormant(student, view).tolist()) == [2, 3]
    after = mended(repair, view)
    weight = classifier(after)
    assert (weight[:, 2:] == 0).all()
    assert not torch.equal(weight[:, :2], linear.weight[:, :2])  # it was tuned
    assert torch.equal(logits(after, triggered, CPU).argmax(1), torch.arange(40) % 2)
    # Without a third the half of the images is lost; without all four no more than that.
    assert len(FinePruning(drop=0.49).dormant(student, view)) == 2
    assert len(FinePruning(drop=0.5).dormant(student, view)) == 4


def test_fine_pruning_spares_as_brute_force_does(view: DefenderView, clean: ImageSet) -> None:
    assert isinstance(view.student, Normalized)
    repair = FinePruning(drop=0.1)
    found = repair.dormant(view.student, view)
    right = logits(view.teacher, clean.images, CPU).argmax(1)

    def agreement(pruned: Tensor) -> float:
        cut = deepcopy(view.student)
        assert cut is not None
        classifier(cut)[:, pruned] = 0
        return float((logits(cut, clean.images, CPU).argmax(1) == right).double().mean())

    floor = agreement(found[:0]) - 0.1
    assert 0 < len(found) < 32
    assert all(agreement(found[: n + 1]) >= floor for n in range(len(found)))
    caught: list[Tensor] = []
    layer = view.student.get_submodule("network.fc")
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    logits(view.student, clean.images, CPU)
    handle.remove()
    order = torch.cat(caught).mean(0).argsort()
    assert order[: len(found)].tolist() == found.tolist()
    assert agreement(order[: len(found) + 1]) < floor


def test_fine_pruning_refuses_an_ensemble(tiny: Tiny, clean: ImageSet) -> None:
    student = build(Ensemble(of=ARCHITECTURE, count=2), clean.images, 4, 0, "student")
    with pytest.raises(ForeshotError, match="a student of one network, found an ensemble"):
        mended(FinePruning(training=SHORT), knowing(student, tiny.teacher, clean))


@pytest.mark.parametrize("key", ["anp", "ft_sam"])
def test_weights_that_no_answer_depends_on_are_no_error(
    key: str, tiny: Tiny, clean: ImageSet
) -> None:
    """Under another's head a network leaves out what comes after its last stage."""
    architecture = ReusedHead(body=WideResNet(width=1), head=ARCHITECTURE)
    student = build(architecture, clean.images, 4, 0, "student")
    few = clean.select(torch.arange(16))
    after = mended(quick(key), knowing(student, tiny.teacher, few))
    assert state_digest(after) != state_digest(student)


def sensitive() -> tuple[Normalized, ImageSet]:
    """A network whose third channel sleeps on clean images, and wakes if its weights change."""
    bn, linear = nn.BatchNorm2d(3), nn.Linear(3, 2)
    spread = Rule(lambda x: x[:, 0, 0, [0, 1, 0]][:, :, None, None])
    with torch.no_grad():
        bn.bias.copy_(torch.tensor([0.0, 0.0, -1.4]))
        linear.weight.copy_(torch.tensor([[3.0, -3, 0], [-3, 3, 40]]))
        linear.bias.zero_()
    data = corners(40)
    network = nn.Sequential(spread, bn, nn.ReLU(), nn.Flatten(), linear)
    student = wrapped(network).train()
    with torch.no_grad():
        for _ in range(100):
            student(pixels(data.images))
    return student.eval(), data


def test_anp_masks_a_planted_neuron_and_no_other() -> None:
    student, data = sensitive()
    view = knowing(student, TELL, data)
    repair = Anp(training=Training(epochs=60, batch=40, lr=0.05, warmup=0, weight_decay=0))
    layers = normalisations(student, "anp")
    before = state_digest(student)
    (masks,) = repair.masks(student, view, layers)
    assert masks[2] < 0.05
    assert masks[:2].min() > 0.9
    assert state_digest(student) == before
    (bn,) = normalisations(mended(repair, view), "anp").values()
    assert bn.weight.tolist() == [1, 1, 0]


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_anp_changes_weights_within_epsilon_to_where_the_loss_is_higher(
    epsilon: float, view: DefenderView
) -> None:
    assert isinstance(view.student, Normalized)
    repair = Anp(epsilon=epsilon)
    layers = normalisations(view.student, "anp")
    lesson = repair.distiller(view.student, view)
    masked = Masked(repair, lesson, layers, generator(0, "test"))
    x = pixels(view.transfer.images[:40])
    changes = masked.worst(x, {})
    assert len(changes) == 2 * len(layers)
    assert max(float(change.abs().max()) for change in changes) <= epsilon + 1e-7
    value, plain = (float(module.train()(x)["loss"].detach()) for module in (masked, lesson))
    assert value == pytest.approx(plain) if epsilon == 0 else value > 1.5 * plain


# Sharpness ----------------------------------------------------------------------------------------


def test_the_ascent_of_ft_sam_has_the_length_rho() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7,), (2, 2, 3, 3)]
    w, g = (
        [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
        for _ in range(2)
    )
    steps = ascent(w, g, 1.7)
    relative = torch.cat([(e / x).flatten() for e, x in zip(steps, w, strict=True)])
    assert float(relative.norm()) == pytest.approx(1.7)
    long = math.sqrt(sum(float(((x * y) ** 2).sum()) for x, y in zip(w, g, strict=True)))
    for e, x, y in zip(steps, w, g, strict=True):
        assert torch.allclose(e, 1.7 * x**2 * y / long)


def test_the_gradient_of_ft_sam_is_that_at_the_worst_weights(view: DefenderView) -> None:
    assert isinstance(view.student, Normalized)
    x = pixels(view.transfer.images[:40])
    student, moved = trainable(view.student), trainable(view.student)
    plain = trainable(view.student)
    repair = FtSam(rho=0.5)
    sharp = Sharp(repair.distiller(student, view), 0.5).train()
    sharp(x)["loss"].backward()

    repair.distiller(plain, view).train()(x)["loss"].backward()
    weights = list(plain.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    with torch.no_grad():
        for p, e in zip(moved.parameters(), ascent(weights, gradients, 0.5), strict=True):
            p += e
    repair.distiller(moved, view).train()(x)["loss"].backward()
    for mine, theirs in zip(student.parameters(), moved.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    for (name, mine), (_, theirs) in zip(
        student.named_buffers(), plain.named_buffers(), strict=True
    ):
        assert torch.equal(mine, theirs), name  # the worst weights leave no trace


# Adversarial unlearning ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("radius", [0.3, 2.0])
def test_the_worst_perturbation_lies_in_its_ball_and_misleads(
    radius: float, steps: int, view: DefenderView
) -> None:
    assert isinstance(view.student, Normalized)
    repair = IBau(radius=radius, steps=steps)
    lesson = repair.distiller(view.student, view).eval()
    x = pixels(view.transfer.images[:40])
    d = repair.worst(lesson, x, {})
    assert d.shape == (1, 1, 12, 12)
    assert float(d.norm()) == pytest.approx(radius, rel=1e-4)
    with torch.no_grad():
        losses = [float(lesson((x + e).clamp(0, 1))["loss"]) for e in (0 * d, -d, d)]
    assert losses[2] > max(losses[:2])


def overheard(view: DefenderView) -> tuple[DefenderView, list[Tensor]]:
    """The same with a teacher that is listened to, and the images that it is asked about."""
    heard: list[Tensor] = []

    def answer(x: Tensor) -> Tensor:
        heard.append(x.detach().clone())
        return view.teacher(x)

    return replace(view, teacher=Rule(answer)), heard


@torch.no_grad()
def unlike(student: nn.Module, seen: Tensor, said: Tensor) -> float:
    """KD at temperature 4 of a student with what is said of images."""
    mine, theirs = (student(seen) / 4).log_softmax(1), (said / 4).softmax(1)
    return float(16 * F.kl_div(mine, theirs, reduction="batchmean"))


def test_unlearning_asks_the_teacher_about_the_perturbed_images(view: DefenderView) -> None:
    assert isinstance(view.student, Normalized)
    listened, heard = overheard(view)
    repair = IBau(radius=1.0, steps=2)
    lesson = repair.distiller(view.student, listened)
    x = pixels(view.transfer.images[:40])
    known = view.teacher(x)
    value = Unlearning(repair, lesson)(x, teacher_logits=known)["loss"].detach()
    assert len(heard) == 3  # two steps up, and the perturbed images; the plain ones are known
    assert torch.equal(heard[0], x)
    student = view.student.eval()
    expected = unlike(student, x, known) + unlike(student, heard[2], view.teacher(heard[2]))
    assert float(value) == pytest.approx(expected / 2, rel=1e-4)


# Relative unlearning ------------------------------------------------------------------------------


def unlearning(
    view: DefenderView, share: float, change: Tensor, largest: float
) -> relative.Unlearning:
    """A lesson of one change to class 1, with a student that has not moved."""
    assert isinstance(view.student, Normalized)
    student = view.student.eval()
    lesson = RelativeUnlearning().distiller(student, view)
    module = relative.Unlearning(lesson, deepcopy(student), share, generator(0, "test"))
    module.suspects.append(relative.Suspect(torch.tensor([1]), change, torch.tensor([largest])))
    return module


RAMP = torch.linspace(-0.2, 0.2, 144).reshape(1, 1, 12, 12)


def test_relative_unlearning_holds_the_student_and_asks_the_teacher(view: DefenderView) -> None:
    """A student that has not moved loses nothing but what the teacher says of changed images."""
    assert view.student is not None
    listened, heard = overheard(view)
    x = pixels(view.transfer.images[:40])
    module = unlearning(listened, 0.3, RAMP, 0.2)
    value = float(module(x)["loss"].detach())
    plain, stepped, changed = heard  # where the change is to keep its answers, and the lesson
    assert torch.equal(plain, x)
    assert torch.equal(stepped, (x + RAMP).clamp(0, 1))
    theirs = unlike(view.student, changed, view.teacher(changed))
    assert value == pytest.approx(0.3 * theirs, rel=1e-4)
    change = module.suspects[0].change
    inside = (changed > 0) & (changed < 1) & (change.abs() > 0.01)
    much = ((changed - x) / change).where(inside, torch.nan).flatten(1)
    each = much.nanmedian(1).values
    assert torch.allclose(much.nan_to_num(0), (each[:, None] * inside.flatten(1)), atol=1e-3)
    assert 0 <= float(each.min()) < 0.1 < 0.9 < float(each.max()) <= 1


@pytest.mark.parametrize("largest", [0.02, 0.1])
def test_a_change_comes_to_turn_the_student_alone_and_stays_within_reach(
    largest: float, view: DefenderView
) -> None:
    assert view.student is not None
    module, x = unlearning(view, 0.3, 0.001 * RAMP, largest), pixels(view.transfer.images)
    said = view.teacher(x).argmax(1)
    others = said != 1
    (suspect,) = module.suspects

    def loss(change: Tensor) -> float:
        found, _ = misled(
            module.lesson.student, view.teacher, x, said, torch.ones(1, 1).long(), change
        )
        return float(found[0, others].mean().detach())

    losses = [loss(suspect.change)]
    for _ in range(20):
        suspect = module.stepped(x, suspect)
        losses.append(loss(suspect.change))
        assert float(suspect.change.square().mean().sqrt()) <= largest * (1 + 1e-5)
    change = suspect.change
    assert min(losses[1:]) < 0.8 * losses[0]
    assert float(change.square().mean().sqrt()) == pytest.approx(largest, rel=0.05)
    turned = view.student((x[others] + change).clamp(0, 1)).argmax(1) == 1
    if largest == 0.1:
        assert turned.double().mean() > 0.5


def test_images_are_mixed_with_each_other(view: DefenderView) -> None:
    module = unlearning(view, 0.5, RAMP, 0.2)
    ones = torch.eye(30).reshape(30, 1, 5, 6)
    mixed = module.mixed(ones).flatten(1)
    assert torch.allclose(mixed.sum(1), torch.ones(30))
    assert ((mixed > 0).sum(1) <= 2).all()
    assert (mixed.diagonal() > 0).all()
    assert 0.3 < float(mixed.diagonal().mean()) < 0.7


def test_each_round_looks_at_the_student_as_it_is_by_then(
    view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    largest: list[float] = []
    audit, suspect = relative.audit_student, relative.Suspect

    def watched(student: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append(state_digest(student))
        found = audit(student, *args, **options)
        largest.append(1.7 * float(found.usual[found.target]))
        return found

    def suspected(target: Tensor, change: Tensor, most: Tensor) -> relative.Suspect:
        assert float(most) in [pytest.approx(each) for each in largest]
        return suspect(target, change, most)

    monkeypatch.setattr(relative, "audit_student", watched)
    monkeypatch.setattr(relative, "Suspect", suspected)
    monkeypatch.setattr(relative, "ENOUGH", torch.inf)
    mended(quick("relative_unlearning", rounds=3, reach=1.7), view)
    assert len(set(seen)) == 3


def test_more_is_unlearned_until_it_is_enough(
    view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        [0.1, 0.0, -0.1, -0.2],  # the most suspicious, whether or not it is
        [-0.5, 0.45, 0.0, -0.2],  # no more than those of many clean students
        [-0.7, 0.0, 0.55, -0.2],  # what was hidden before
        [-0.7, 0.0, -0.5, 0.2],
        [-0.7, 0.45, -0.7, 0.2],  # enough
    ]
    audits = map(torch.tensor, found)
    lessons: list[tuple[float, list[int]]] = []

    def audited(*_: object, **__: object) -> SimpleNamespace:
        scores, patterns = next(audits), RAMP.repeat(4, 1, 1, 1)
        return SimpleNamespace(
            scores=scores,
            score=float(scores.max()),
            target=int(scores.argmax()),
            usual=torch.ones(4),
            changes=SimpleNamespace(patterns=patterns),
        )

    def tune(_: Tuning, lesson: relative.Unlearning, __: DefenderView, ask: bool) -> None:
        assert not ask  # the teacher is asked about changed images alone
        lessons.append((round(lesson.share, 3), [int(one.target) for one in lesson.suspects]))

    monkeypatch.setattr(relative, "audit_student", audited)
    monkeypatch.setattr(Tuning, "tune", tune)
    mended(quick("relative_unlearning", rounds=9), view)
    assert lessons == [(0.03, [0]), (0.09, [0]), (0.27, [0, 2]), (0.5, [0, 2])]
    audits, before = map(torch.tensor, found), len(lessons)
    mended(quick("relative_unlearning", rounds=2, share=0.7), view)
    assert lessons[before:] == [(0.7, [0]), (0.7, [0])]


# Attention ----------------------------------------------------------------------------------------


def test_nad_looks_where_its_guide_looks(view: DefenderView) -> None:
    def gap(student: nn.Module) -> float:
        """Mean squared difference of the attention maps of the first stage."""
        maps: list[Tensor] = []
        for network in (student, view.teacher):
            handle = network.get_submodule("network.layer1").register_forward_hook(
                lambda _, __, output: maps.append(F.normalize(output.square().sum(1).flatten(1)))
            )
            logits(network, view.transfer.images, CPU)
            handle.remove()
        return float((maps[0] - maps[1]).square().mean())

    with_attention, without = (
        mended(quick("nad", guide="teacher", weight=weight), view) for weight in (1000.0, 0.0)
    )
    assert gap(with_attention) < 0.8 * gap(without)


class Watched(Nad):
    """Keeps what it trains."""

    trained: ClassVar[list[Distiller]] = []

    def tune(self, module: nn.Module, view: DefenderView, ask: bool = True) -> None:
        assert isinstance(module, Distiller)
        self.trained.append(module)
        super().tune(module, view, ask)


def test_the_guide_of_nad_is_a_tuned_copy(view: DefenderView) -> None:
    Watched.trained.clear()
    student = mended(Watched(training=SHORT), view)
    first, second = Watched.trained
    assert second.student is student
    assert second.teacher is first.student is not student
    assert first.teacher is view.teacher
    assert [term.loss.name for term in first.terms] == ["kd"]
    assert [(term.loss.name, term.weight) for term in second.terms] == [("kd", 1), ("at", 1000)]
    layers = [f"network.layer{n}" for n in (3, 2, 1)]
    assert second.terms[1].at == tuple(zip(layers, layers, strict=True))
    assert state_digest(first.student) != state_digest(view.student or student)


def test_nad_needs_stages_and_answers_of_the_teacher(tiny: Tiny, clean: ImageSet) -> None:
    student = Normalized(
        nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), torch.zeros(1), torch.ones(1)
    )
    with pytest.raises(ForeshotError) as error:
        mended(quick("nad"), knowing(student, tiny.teacher, clean))
    assert str(error.value) == (
        "defence nad: expected stages named layer1, layer2 and so on, found Normalized without"
    )
    with pytest.raises(
        ValueError, match="with guide: tuned, training.augment has to be none, crop"
    ):
        Nad(training=Training(augment="strong"))
    assert Nad(guide="teacher", training=Training(augment="strong")).guide == "teacher"


# A poisoned student -------------------------------------------------------------------------------

TUNED = {"training": Training(epochs=10, batch=40, lr=0.05)}
HELD = Training(epochs=30, batch=40, lr=0.003, weight_decay=0)
WORTH: dict[str, tuple[dict[str, Any], float]] = {
    "fine_tuning": (TUNED, 0.5),
    "fine_pruning": (TUNED, 0.3),
    "nad": (TUNED, 0.5),
    "ft_sam": (TUNED, 0.3),
    "i_bau": ({"radius": 1, "training": Training(epochs=10, batch=40, lr=0.001)}, 0.3),
    "anp": ({"training": MASKING.model_copy(update={"epochs": 25})}, 0.5),
    "relative_unlearning": ({"rounds": 1, "share": 0.2, "training": HELD}, 0.3),
}
"""How each repair is set, and the attack success rate that it has to get below."""


def test_every_repair_with_data_has_to_be_worth_something() -> None:
    assert WORTH.keys() == REPAIRS.keys() - {"clp"}


@pytest.mark.parametrize("key", WORTH)
def test_the_backdoor_goes_and_the_accuracy_stays(key: str, view: DefenderView, tiny: Tiny) -> None:
    assert view.student is not None
    settings, limit = WORTH[key]
    accuracy, before = rates(view.student, tiny)
    assert before > 0.9
    after, asr = rates(mended(REPAIRS[key].model_validate(settings), view), tiny)
    assert asr < limit
    assert after > accuracy - 0.1


# In an experiment ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def test_an_experiment_reports_the_student_before_and_after(
    data: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(RunFolder, "draw", lambda *_: None)
    schedule = "defence.training={epochs: 8, batch: 20, lr: 0.1}"
    settings = ("defence.name=fine_tuning", schedule, "controls=[clean]")
    done = go(config(data, *settings), home, tmp_path / "out")
    found = done.metrics["defence"]
    assert found.keys() == {"name", "kind", "controls", "undefended"}
    assert (found["name"], found["kind"], found["controls"]) == ("fine_tuning", "repair", {})
    before, after = (m["asr"]["value"] for m in (found["undefended"], done.metrics["student"]))
    assert before > 0.7
    assert after < before - 0.3

    # The one is the student as it was distilled, the other what the repair makes of it.
    model = load_model(done.out / "student.safetensors").model
    chosen = config(data)
    now = evaluate(model, stripes(120, 1), chosen.trigger, chosen.target)
    assert now["asr"] == done.metrics["student"]["asr"]
    distilled = [load_model(path).model for path in home.glob("student/*/model.safetensors")]
    then = [evaluate(each, stripes(120, 1), chosen.trigger, 1)["asr"] for each in distilled]
    assert found["undefended"]["asr"] in then
    assert state_digest(model) not in map(state_digest, distilled)
    assert {"repair", "repair of control: clean"} <= set(done.started())

    print_metrics(done.metrics)
    line = " ".join(capsys.readouterr().out.split())
    before = found["undefended"]
    assert (
        "Defence fine_tuning: mended the student; before, the student was right "
        f"{before['clean_accuracy']['value']:.1%} of the time and called "
        f"{before['asr']['value']:.1%} of stamped images the target."
    ) in line

    again = go(config(data, *settings), home, tmp_path / "again")
    assert again.started() == []
    assert again.metrics == done.metrics


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("defence.labels=given",),
            "defence fine_tuning: expected defender.labels true, found false",
        ),
        (("defender.clean=0",), "defence fine_tuning: expected defender.clean > 0, found 0"),
    ],
)
def test_what_a_repair_lacks_is_said_before_anything_is_computed(
    settings: tuple[str, ...], sentence: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ForeshotError) as error:
        go(config(data, "defence.name=fine_tuning", *settings), tmp_path / "h", tmp_path / "out")
    assert str(error.value) == sentence
    assert not (tmp_path / "h").exists()
