"""One contract over every member of every family: a new member is tested by being listed."""

import pickle
import random
from inspect import cleandoc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import nn

from conftest import NoWaiting, Tiny
from foreshot.attacks import ATTACKS, AnyAttack, Attack, Clean
from foreshot.compression import COMPRESSIONS, AnyCompression
from foreshot.compromises import COMPROMISES, AnyCompromise
from foreshot.compute import CPU
from foreshot.data import DATASETS, AnyDataset, Dataset
from foreshot.defences import DEFENCES, AnyDefence
from foreshot.distillation import LOSSES, AnyLoss, Loss, Signals
from foreshot.family import Member
from foreshot.models import ARCHITECTURES, AnyArchitecture, build
from foreshot.models.checkpoint import state_digest
from foreshot.poison import Poison
from foreshot.triggers import TRIGGERS, AnyTrigger, Learned, Trigger
from foreshot.triggers.base import stamp_uint8, unperturbed
from foreshot.triggers.learned import save_picture
from foreshot.views import AttackerView

FAMILIES: dict[str, tuple[dict[str, type[Any]], Any]] = {
    "dataset": (DATASETS, AnyDataset),
    "architecture": (ARCHITECTURES, AnyArchitecture),
    "trigger": (TRIGGERS, AnyTrigger),
    "attack": (ATTACKS, AnyAttack),
    "loss": (LOSSES, AnyLoss),
    "compression": (COMPRESSIONS, AnyCompression),
    "compromise": (COMPROMISES, AnyCompromise),
    "defence": (DEFENCES, AnyDefence),
}


def made(member: type[Any]) -> Any:
    """The member with its defaults; only a dataset of the user's files may need paths."""
    required = {key: field for key, field in member.model_fields.items() if field.is_required()}
    assert not required or issubclass(member, Dataset)
    assert all(field.annotation is Path for field in required.values())
    return member(**{key: Path(key) for key in required})


every_member = pytest.mark.parametrize(
    ("family", "key"), [(f, key) for f, (members, _) in FAMILIES.items() for key in members]
)


@every_member
def test_a_member_is_its_own_config(family: str, key: str) -> None:
    members, union = FAMILIES[family]
    member = made(members[key])
    assert isinstance(member, Member)
    assert member.model_dump()["name"] == key
    assert pickle.loads(pickle.dumps(member)) == member
    assert TypeAdapter(union).validate_python(member.model_dump(mode="json")) == member
    assert TypeAdapter(union).validate_json(member.model_dump_json()) == member
    assert hash(member) == hash(made(members[key]))
    field = next(iter(members[key].model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(member, field, getattr(member, field))
    with pytest.raises(ValidationError, match="extra"):
        members[key](**member.model_dump(), nonsense=1)


@every_member
def test_a_member_says_what_it_is_and_what_its_fields_mean(family: str, key: str) -> None:
    member = FAMILIES[family][0][key]
    assert "__doc__" in vars(member)
    text = cleandoc(member.__doc__ or "")
    summary = member.summary()
    assert summary == text.split("\n", 1)[0]
    assert 15 < len(summary) < 100
    assert summary.endswith(".")
    assert summary[0].isupper()
    documented = " ".join(
        cleandoc(kind.__doc__ or "").partition("Args:")[2]
        for kind in member.__mro__
        if issubclass(kind, BaseModel)
    )
    for field in member.model_fields:
        if field != "name":
            assert f" {field}:" in documented or f" {field}, " in documented, field


@pytest.mark.parametrize(
    "key", [key for key, kind in DATASETS.items() if kind.generated or key == "digits"]
)
def test_a_dataset_without_files_loads_the_same_bytes(key: str, tmp_path: Path) -> None:
    small = {"train": 40, "test": 30} if "train" in DATASETS[key].model_fields else {}
    member = DATASETS[key].model_validate({"name": key, **small})
    first, second = member.load(tmp_path), member.load(tmp_path)
    for one, two in zip(first, second, strict=True):
        assert one.digest == two.digest
        assert one.images.dtype == torch.uint8
        assert one.labels is not None
        assert one.images.float().std() > 10
    assert first.train.classes == first.test.classes
    assert first.train.shape == first.test.shape
    assert first.train.digest != first.test.digest
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_an_architecture_builds_the_same_network(key: str, keep_rng: None) -> None:
    smaller = {"vit": {"depth": 3}, "resnet": {"depth": 8}}.get(key, {})
    member = ARCHITECTURES[key].model_validate({"name": key, **smaller})
    images = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    model, again, other = (build(member, images, 7, 3, role) for role in ("a", "a", "b"))
    assert state_digest(model) == state_digest(again) != state_digest(other)
    with torch.no_grad():
        said = model.eval()(images / 255)
        assert said.shape == (4, 7)
        assert said.dtype == torch.float32
        assert torch.isfinite(said).all()
        assert torch.allclose(model(images[1:2] / 255), said[1:2], atol=1e-4)


def ready_trigger(key: str, folder: Path, channels: int, **parameters: Any) -> Trigger:
    """A trigger that can stamp; if it has to be learned, its start stands for what it learns."""
    trigger = TRIGGERS[key].model_validate(parameters)
    if not isinstance(trigger, Learned):
        return trigger
    pattern = (trigger.picture((channels, 12, 12)) * 255).to(torch.uint8)
    save_picture(folder / "pattern.png", pattern)
    return trigger.learned(folder / "pattern.png")


@pytest.mark.parametrize("key", TRIGGERS)
def test_a_trigger_stamps_within_range_and_rounds_to_levels(
    key: str, keep_rng: None, tmp_path: Path
) -> None:
    trigger = ready_trigger(key, tmp_path, 3)
    images = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    stamped = stamp_uint8(trigger, images)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == images.shape
    assert not torch.equal(stamped, images)
    assert torch.equal(stamped, stamp_uint8(trigger, images))
    assert torch.equal(stamped[1:2], stamp_uint8(trigger, images[1:2]))


# Losses ------------------------------------------------------------------------------------------


def compared(key: str, count: int = 6, dtype: torch.dtype = torch.float32) -> Signals:
    """What a loss compares, as the Distiller gives it: two pairs of layers, or the logits."""
    random = torch.Generator().manual_seed(0)
    shapes = [((count, 5), (count, 5))]
    if LOSSES[key].on_features:
        maps = ((count, 4, 6, 6), (count, 8, 6, 6)), ((count, 8, 3, 3), (count, 16, 3, 3))
        shapes = [((count, 12), (count, 20))] if key in VECTORS else list(maps)
        if key == "simkd":  # whose student projects to the teacher's channels
            shapes = [(maps[0][1], maps[0][1])]
    pairs = [
        (
            torch.randn(one, generator=random, dtype=dtype).requires_grad_(),
            torch.randn(other, generator=random, dtype=dtype),
        )
        for one, other in shapes
    ]
    return Signals(pairs, torch.arange(count) % 5, torch.arange(count))


VECTORS = {"rkd", "pkt", "cc", "crd"}
"""Losses of feature vectors, not maps."""


def ready(key: str, dtype: torch.dtype = torch.float32) -> tuple[Loss, nn.Module | None]:
    loss = LOSSES[key].model_validate({})
    example = [(a.detach(), b) for a, b in compared(key, dtype=dtype).pairs]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learned = loss.learn(example, samples=20)
    return loss, learned if learned is None else learned.to(dtype)


@pytest.mark.parametrize("key", LOSSES)
def test_a_loss_is_finite_and_every_image_has_a_say(key: str) -> None:
    loss, learned = ready(key)
    signals = compared(key)
    with NoWaiting():
        value = loss.value(signals, learned)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    gradients = torch.autograd.grad(value, [student for student, _ in signals.pairs])
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("key", LOSSES)
def test_a_loss_is_deterministic_and_as_wide_as_its_signals(key: str) -> None:
    values = []
    for _ in range(2):
        loss, learned = ready(key, torch.float64)
        values.append(loss.value(compared(key, dtype=torch.float64), learned))
    assert values[0].dtype == torch.float64
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("key", [k for k, kind in LOSSES.items() if not kind.on_features])
def test_a_loss_of_logits_is_least_where_both_agree(key: str) -> None:
    loss, learned = ready(key)
    ((student, teacher),) = compared(key).pairs
    y = teacher.argmax(1)
    value, agreed = (
        loss.value(Signals([(z, teacher)], y, torch.arange(6)), learned) for z in (student, teacher)
    )
    assert agreed < value


# Attacks -----------------------------------------------------------------------------------------

REHEARSAL: dict[str, Any] = {
    "steps": 2,
    "student": {"name": "resnet", "depth": 8, "width": 0.5, "stem_stride": 2},
    "training": {"epochs": 1},
}
QUICK: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 2},
    "cw": {"steps": 2},
    "perturbation_only": {"steps": 2},
    "cw_l2": {"steps": 2, "searches": 2},
    "eot": {"steps": 2},
    "counterfactual": REHEARSAL,
    "covered": REHEARSAL,
    "tang": {"steps": 2, "mode": "perturbed"},
    "dehib": {"steps": 2},
    "label_consistent": REHEARSAL,
    "sleeper_agent": REHEARSAL,
}
"""Few steps where the default takes many; an attack that is not named here runs as it is."""


def quick(key: str, **parameters: Any) -> Attack:
    fields = {"name": key, "count": 6, "epsilon": 9, "retries": 1, **QUICK.get(key, {})}
    return ATTACKS[key].model_validate({**fields, **parameters})


def seen(problem: Tiny, trigger: Trigger | None = None, **parameters: Any) -> AttackerView:
    return AttackerView(
        problem.train.images,
        problem.teacher,
        trigger or problem.trigger,
        problem.target,
        0,
        CPU,
        **parameters,
    )


def check(poison: Poison, attack: Attack, view: AttackerView) -> None:
    """What every attack owes whoever stores its poison."""
    assert poison.images.dtype == torch.uint8
    assert poison.images.shape[1:] == view.images.shape[1:]
    assert poison.indices.dtype == torch.int64
    assert len(poison.indices) == len(poison.images)
    assert (poison.indices.diff() > 0).all()
    if not len(poison):
        return
    assert 0 <= poison.indices.min() <= poison.indices.max() < len(view.images)
    original = view.images[poison.indices]
    reference = unperturbed(view.trigger, original, poison.images, attack.stamps)
    distance = (poison.images.short() - reference.short()).abs().amax((1, 2, 3))
    assert distance.max() <= attack.epsilon


@pytest.mark.parametrize("when", ["before", "inside", "after"])
@pytest.mark.parametrize("key", ATTACKS)
def test_poison_is_stored_within_epsilon_of_the_stamped_image(
    key: str, when: str, tiny: Tiny, keep_rng: None
) -> None:
    attack = quick(key, trigger=when, retries=0)
    before, mode = state_digest(tiny.teacher), tiny.teacher.training
    elsewhere = random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    view = seen(tiny)
    poison = attack.craft(view)
    check(poison, attack, view)
    assert len(poison) == (0 if isinstance(attack, Clean) else 6)
    assert state_digest(tiny.teacher) == before
    assert tiny.teacher.training is mode
    assert all(p.grad is None for p in tiny.teacher.parameters())
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == elsewhere  # noqa: NPY002


@pytest.mark.parametrize("key", TRIGGERS)
@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_epsilon_holds_for_every_trigger(key: str, when: str, tiny: Tiny, tmp_path: Path) -> None:
    attack = quick("noise", trigger=when, epsilon=40)
    parameters = {"frequency": 2} if key == "sinusoid" else {}
    view = seen(tiny, ready_trigger(key, tmp_path, 1, **parameters))
    check(attack.craft(view), attack, view)


@pytest.mark.parametrize("key", ATTACKS)
def test_an_attack_is_deterministic_and_no_image_depends_on_the_others(
    key: str, tiny: Tiny
) -> None:
    attack = quick(key)
    whole = attack.craft(seen(tiny))
    again = attack.craft(seen(tiny))
    assert whole.digest == again.digest
    part = attack.craft(seen(tiny, bases=torch.tensor([150, 7, 33])))
    few = attack.craft(seen(tiny, bases=torch.tensor([7])))
    if isinstance(attack, Clean):
        return
    assert part.indices.tolist() == [7, 33, 150]
    assert torch.equal(part.images[:1], few.images)


@pytest.mark.parametrize("key", ["pgd", "noise"])
def test_another_seed_makes_other_poison(key: str, tiny: Tiny) -> None:
    attack, bases = quick(key, retries=0), torch.tensor([1, 2, 3])
    one = attack.craft(seen(tiny, bases=bases))
    other = attack.craft(
        AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, 1, 1, CPU, bases)
    )
    assert not torch.equal(one.images, other.images)


def test_more_images_than_a_chunk_are_crafted_as_each_alone(tiny: Tiny) -> None:
    attack = quick("pgd", retries=0, base="any")
    many = attack.craft(seen(tiny, bases=torch.arange(300)))
    alone = attack.craft(seen(tiny, bases=torch.tensor([3, 299])))
    assert torch.equal(many.images[[3, 299]], alone.images)
