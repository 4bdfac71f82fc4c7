"""Attacks against plain re-implementations, and what they achieve on a small problem."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Rule, Tiny
from foreshot.attacks import (
    Attack,
    Clean,
    Cw,
    CwL2,
    DirtyLabel,
    Fgsm,
    Noise,
    PerturbationOnly,
    Pgd,
    TriggerOnly,
    craft,
)
from foreshot.attacks.cw import margin
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.models.checkpoint import state_digest
from foreshot.poison import Poison
from foreshot.progress import Event
from foreshot.triggers import Blend, Patch
from foreshot.triggers.base import stamp_uint8
from foreshot.views import AttackerView

TARGET = 2
SHAPE = (3, 6, 6)
PATCH = Patch(size=2, margin=0)


def linear(seed: int = 0, dtype: torch.dtype = torch.float32) -> Rule:
    """Four logits, each a weighted sum of the pixels; so small that no softmax is saturated."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn((math.prod(SHAPE), 4), generator=random).to(dtype) / 4
    return Rule(lambda x: (x - 0.5).flatten(1) @ weights)


def some(count: int = 5, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *SHAPE), generator=random).to(torch.uint8)


def crafted(attack: Attack, images: Tensor, model: Rule, trigger: Any = PATCH) -> Poison:
    """Poison of every image, in their order."""
    view = AttackerView(images, model, trigger, TARGET, 0, CPU, torch.arange(len(images)))
    return attack.craft(view)


def descend(
    images: Tensor, attack: Any, steps: int, step: float, loss: Any, trigger: Any = PATCH
) -> Tensor:
    """Signed-gradient descent, one image at a time, in float64 and in levels of 255."""
    model = linear(dtype=torch.float64)
    results = []
    for image in images:
        home = image[None] if attack.trigger == "after" else stamp_uint8(trigger, image[None])
        centre = home.double()
        x = centre.clone()
        for _ in range(steps):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(x / 255)), x)
            x = x.detach() - step * gradient.sign()
            x = torch.clamp(x, centre - attack.epsilon, centre + attack.epsilon).clamp(0, 255)
            if attack.trigger == "inside":
                x[..., -2:, -2:] = centre[..., -2:, -2:]
        stored = x.round()
        if attack.trigger == "after":
            stored[..., -2:, -2:] = stamp_uint8(trigger, image[None])[..., -2:, -2:].double()
        results.append(stored.to(torch.uint8))
    return torch.cat(results)


def cross_entropy(said: Tensor, temperature: float = 1) -> Tensor:
    return torch.logsumexp(said / temperature, 1).sum() - said[:, TARGET].sum() / temperature


def hinge(said: Tensor, kappa: float) -> Tensor:
    others = said[:, [k for k in range(said.shape[1]) if k != TARGET]]
    return (others.max(1).values - said[:, TARGET]).clamp(min=-kappa).sum()


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_fgsm_is_one_signed_step_of_epsilon(when: str) -> None:
    attack = Fgsm(epsilon=7, trigger=when, retries=0)  # type: ignore[arg-type]
    found = crafted(attack, some(), linear()).images
    assert torch.equal(found, descend(some(), attack, 1, 7, cross_entropy))
    free = (found.short() - stamp_uint8(PATCH, some()).short()).abs() > 0
    assert free[..., :-2, :].float().mean() > 0.95


@pytest.mark.parametrize("when", ["before", "inside", "after"])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_pgd_without_a_random_start_is_the_naive_loop(when: Any, temperature: float) -> None:
    attack = Pgd(
        epsilon=4, trigger=when, retries=0, steps=6, step=1.17, random_start=False
    ).model_copy(update={"temperature": temperature})
    found = crafted(attack, some(), linear()).images
    naive = descend(some(), attack, 6, 1.17, lambda said: cross_entropy(said, temperature))
    assert torch.equal(found, naive)


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_pgd_along_the_gradient_is_the_naive_loop(when: Any) -> None:
    """Steps of epsilon in root mean square over the image, that shrink linearly to zero."""
    fields: dict[str, Any] = {"epsilon": 4, "trigger": when, "retries": 0, "random_start": False}
    found = crafted(Pgd(steps=5, direction="gradient", **fields), some(), linear()).images
    model = linear(dtype=torch.float64)
    for image, ours in zip(some(), found, strict=True):
        home = image[None] if when == "after" else stamp_uint8(PATCH, image[None])
        centre = home.double()
        x = centre.clone()
        for length in (4, 3.2, 2.4, 1.6, 0.8):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model(x / 255)), x)
            x = x.detach() - length * gradient / gradient.pow(2).mean() ** 0.5
            x = torch.clamp(x, centre - 4, centre + 4).clamp(0, 255)
            if when == "inside":
                x[..., -2:, -2:] = centre[..., -2:, -2:]
        if when == "after":
            x[..., -2:, -2:] = stamp_uint8(PATCH, image[None])[..., -2:, -2:].double()
        # float32 there and float64 here may round a level that lies halfway to either side
        assert (ours.double() - x[0]).abs().max() <= 0.501
    assert not torch.equal(found, crafted(Pgd(steps=5, **fields), some(), linear()).images)


def test_a_gradient_of_zero_moves_nothing() -> None:
    flat = Rule(lambda x: 0 * x.flatten(1)[:, :4])
    attack = Pgd(steps=2, direction="gradient", retries=0, random_start=False)
    assert torch.equal(crafted(attack, some(), flat).images, stamp_uint8(PATCH, some()))


def test_the_default_step_is_two_and_a_half_epsilon_over_steps() -> None:
    fields: dict[str, Any] = {"epsilon": 8, "retries": 0, "steps": 7, "random_start": False}
    default = crafted(Pgd(**fields), some(), linear()).images
    assert torch.equal(default, crafted(Pgd(**fields, step=20 / 7), some(), linear()).images)
    assert not torch.equal(default, crafted(Pgd(**fields, step=1), some(), linear()).images)


@pytest.mark.parametrize("kappa", [0.0, 3.0, 50.0])
def test_cw_is_the_naive_loop_on_the_margin(kappa: float) -> None:
    attack = Cw(epsilon=9, retries=0, steps=7, step=1.17, random_start=False, kappa=kappa)
    found = crafted(attack, some(12), linear()).images
    naive = descend(some(12), attack, 7, 1.17, lambda said: hinge(said, kappa))
    assert torch.equal(found, naive)


def test_cw_leaves_an_image_alone_that_has_the_margin_already() -> None:
    images = some(40)
    said = linear()(stamp_uint8(PATCH, images).float() / 255)
    has = margin(said, TARGET, 1.0) <= -1
    assert 0 < has.sum() < 40
    attack = Cw(epsilon=9, retries=0, steps=3, random_start=False, kappa=1)
    found = crafted(attack, images, linear()).images
    kept = (found == stamp_uint8(PATCH, images)).flatten(1).all(1)
    assert torch.equal(kept, has)


@given(
    said=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6),
    target=st.integers(0, 5),
    kappa=st.floats(0, 30),
)
@settings(deadline=None, max_examples=60)
def test_the_margin_is_the_best_other_logit_less_the_targets(
    said: list[float], target: int, kappa: float
) -> None:
    target %= len(said)
    others = max(z for k, z in enumerate(said) if k != target)
    expected = max(others - said[target], -kappa)
    row = torch.tensor([said], dtype=torch.float64)
    assert margin(row, target, kappa).item() == pytest.approx(expected)
    assert row.tolist() == [said]


def test_a_real_network_is_attacked_as_by_a_naive_loop_in_float64(tiny: Tiny) -> None:
    images = tiny.train.images[:6]
    attack = Pgd(epsilon=8, steps=5, step=2.3, random_start=False, retries=0, trigger="before")
    view = AttackerView(images, tiny.teacher, tiny.trigger, 1, 0, CPU, torch.arange(6))
    found = attack.craft(view).images
    model = deepcopy(tiny.teacher).double().eval()
    home = stamp_uint8(tiny.trigger, images).double() / 255
    x = home
    for _ in range(5):
        x = x.detach().requires_grad_()
        F.cross_entropy(model(x), torch.ones(6, dtype=torch.long), reduction="sum").backward()
        assert x.grad is not None
        x = x.detach() - 2.3 / 255 * x.grad.sign()
        x = torch.clamp(x, home - 8 / 255, home + 8 / 255).clamp(0, 1)
    same = found == (x * 255).round().to(torch.uint8)
    assert same.float().mean() > 0.995


def test_a_random_start_is_uniform_over_the_box() -> None:
    images = torch.full((60, *SHAPE), 128, dtype=torch.uint8)
    attack = Pgd(epsilon=10, steps=1, step=1e-6, retries=0, trigger="before")
    found = crafted(attack, images, linear()).images.short()
    offsets = (found - stamp_uint8(PATCH, images).short())[..., :-2, :].flatten()
    assert offsets.min() == -10
    assert offsets.max() == 10
    assert offsets.float().mean().abs() < 0.3
    assert offsets.float().std() == pytest.approx(20 / math.sqrt(12), abs=0.3)


def counting(calls: list[int]) -> Rule:
    """Never says the target; notes each batch that it is asked the gradient of."""

    def say(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            calls.append(len(x))
        total = x.flatten(1).sum(1, keepdim=True)
        return torch.cat([1000 + total, total, -1000 - total, total], 1)

    return Rule(say)


def test_a_retry_takes_twice_the_steps() -> None:
    calls: list[int] = []
    crafted(Pgd(steps=3, retries=2), some(), counting(calls))
    assert len(calls) == 3 + 6 + 12
    assert len(set(calls)) == 1
    calls.clear()
    crafted(CwL2(steps=2, searches=3, retries=1), some(), counting(calls))
    assert len(calls) == 3 * (2 + 4)


def test_fgsm_retries_with_half_the_step() -> None:
    """Only a step of three to five levels is called the target, so that 8 fails and 4 succeeds."""
    images = torch.full((3, *SHAPE), 100, dtype=torch.uint8)

    def say(x: Tensor) -> Tensor:
        level = x[:, 0, 0, 0] * 255
        hit = 50 * (level - 96).abs() < 75
        slope = -0.01 * level[:, None] * torch.tensor([0.0, 0, 1, 0])
        return slope + torch.where(hit[:, None], torch.tensor([0.0, 0, 9, 0]), torch.zeros(4))

    for retries, moved in ((0, 8), (1, 4)):
        found = crafted(Fgsm(epsilon=8, retries=retries), images, Rule(say)).images
        assert ((found[:, 0, 0, 0].short() - 100).abs() == moved).all()


def rate_of(tiny: Tiny, poison: Poison) -> float:
    said = logits(tiny.teacher, poison.images, CPU).argmax(1)
    return float((said == tiny.target).float().mean())


def on(tiny: Tiny, attack: Attack, **view: Any) -> Poison:
    return craft(attack, tiny.train.images, tiny.teacher, tiny.trigger, tiny.target, **view)


def test_pgd_convinces_the_teacher_and_the_controls_do_not(tiny: Tiny) -> None:
    strong = Pgd(count=20, epsilon=32, steps=10, retries=1)
    assert rate_of(tiny, on(tiny, strong)) >= 0.95
    assert rate_of(tiny, on(tiny, Cw(count=20, epsilon=32, steps=10, retries=1))) >= 0.95
    for control in (TriggerOnly(count=20), Noise(count=20, epsilon=32)):
        assert rate_of(tiny, on(tiny, control)) <= 0.1


def test_retries_raise_the_share_that_convinces(tiny: Tiny) -> None:
    weak = Pgd(count=20, epsilon=16, steps=2, retries=0)
    first = rate_of(tiny, on(tiny, weak))
    second = rate_of(tiny, on(tiny, weak.model_copy(update={"retries": 3})))
    assert first < 0.9
    assert second > first + 0.1


def test_candidates_keep_what_convinces_most_of_each_class(tiny: Tiny) -> None:
    fields: dict[str, Any] = {"epsilon": 16, "steps": 3, "retries": 0, "confidence": 0}
    many = on(tiny, Pgd(count=40, **fields))
    said = logits(tiny.teacher, many.images, CPU).double().log_softmax(1)[:, tiny.target]
    called = logits(tiny.teacher, tiny.train.images[many.indices], CPU).argmax(1)
    kept = on(tiny, Pgd(count=20, candidates=2, **fields))
    which = torch.isin(many.indices, kept.indices)
    assert torch.equal(kept.images, many.images[which])
    for group in called.unique():
        mine = (called == group).nonzero().flatten()
        best = mine[said[mine].argsort(descending=True)]
        number = int(which[mine].sum())
        assert abs(number - len(mine) / 2) <= 0.5
        assert which[best[:number]].all()


def test_of_candidates_that_do_not_convince_the_best_fill_up(tiny: Tiny) -> None:
    fields: dict[str, Any] = {"epsilon": 16, "steps": 3, "retries": 0}
    many = on(tiny, Pgd(count=30, confidence=0, **fields))
    said = logits(tiny.teacher, many.images, CPU).double().softmax(1)[:, tiny.target]
    bar = float(said.sort(descending=True).values[4:6].mean())
    kept = on(tiny, Pgd(count=10, candidates=3, confidence=bar, **fields))
    assert torch.equal(kept.indices, many.indices[said.argsort(descending=True)[:10].sort().values])


def test_base_images_are_chosen_by_what_the_teacher_says(tiny: Tiny) -> None:
    said = logits(tiny.teacher, tiny.train.images, CPU).argmax(1)
    everything = len(tiny.train)
    for base, pool in (
        ("non_target", said != tiny.target),
        ("target", said == tiny.target),
        ("any", torch.ones(everything, dtype=torch.bool)),
    ):
        attack = TriggerOnly(count=int(pool.sum()), base=base)  # type: ignore[arg-type]
        assert torch.equal(on(tiny, attack).indices, pool.nonzero().flatten())
    chosen = on(tiny, TriggerOnly(count=50)).indices
    assert len(set(chosen.tolist())) == 50
    assert chosen.max() > 300
    assert not torch.equal(chosen, on(tiny, TriggerOnly(count=50), seed=1).indices)
    # Fewer images are a part of more, since the order of the pool is fixed.
    assert set(on(tiny, TriggerOnly(count=20)).indices.tolist()) < set(chosen.tolist())


def test_a_count_takes_the_place_of_a_rate(tiny: Tiny) -> None:
    assert len(on(tiny, TriggerOnly(rate=0.1))) == 40
    assert len(on(tiny, TriggerOnly(rate=0.1, count=3))) == 3
    assert len(on(tiny, TriggerOnly(rate=1, base="any"))) == 400


def test_opaque_pixels_stay_as_they_are_only_inside(tiny: Tiny) -> None:
    for when in ("before", "inside", "after"):
        attack = Pgd(count=10, epsilon=20, steps=3, retries=0, trigger=when)  # type: ignore[arg-type]
        poison = on(tiny, attack)
        stamped = stamp_uint8(tiny.trigger, tiny.train.images[poison.indices])
        opaque = tiny.trigger.opaque(tiny.train.shape)
        assert int(opaque.sum()) == 4
        assert bool((poison.images == stamped)[:, opaque].all()) is (when != "before")
        assert (poison.images != stamped)[:, ~opaque].float().mean() > 0.5


def test_a_transparent_trigger_holds_epsilon_when_it_is_put_on_after(tiny: Tiny) -> None:
    trigger = Blend(opacity=0.5, seed=3)
    attack = Pgd(epsilon=20, steps=3, retries=0, trigger="after", random_start=False)
    bases = torch.arange(8)
    view = AttackerView(tiny.train.images, tiny.teacher, trigger, 1, 0, CPU, bases)
    stored = attack.craft(view).images.short()
    distance = (stored - stamp_uint8(trigger, tiny.train.images[:8]).short()).abs()
    assert distance.max() <= 11  # half of what was changed shows through
    assert distance.max() >= 9


def test_without_a_trigger_the_plain_image_is_perturbed(tiny: Tiny) -> None:
    attack = PerturbationOnly(epsilon=6, steps=2, retries=0)
    assert isinstance(attack, Pgd)
    view = AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, 1, 0, CPU, torch.arange(9))
    found = attack.craft(view).images
    distance = (found.short() - tiny.train.images[:9].short()).abs()
    assert distance.max() == 6
    corner = distance[tiny.trigger.opaque(tiny.train.shape).expand(9, -1, -1, -1)]
    assert corner.max() > 0


def test_noise_is_epsilon_everywhere_with_random_signs() -> None:
    images = torch.full((50, *SHAPE), 128, dtype=torch.uint8)
    found = crafted(Noise(epsilon=12), images, linear()).images.short()
    offsets = (found - stamp_uint8(PATCH, images).short())[..., :-2, :]
    assert offsets.unique().tolist() == [-12, 12]
    assert abs(offsets.float().mean()) < 0.6
    assert len(offsets.flatten(1).unique(dim=0)) == 50  # each image has its own


def test_cw_l2_perturbs_less_than_pgd_where_both_convince(tiny: Tiny) -> None:
    bases = torch.tensor([0, 4, 8, 12, 16, 20, 24, 28])
    view = AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, 1, 0, CPU, bases)
    original = stamp_uint8(tiny.trigger, tiny.train.images[bases]).float()
    fields: dict[str, Any] = {"epsilon": 48, "retries": 0, "confidence": 0.9}
    found = {}
    for attack in (Pgd(steps=10, **fields), CwL2(steps=25, searches=3, lr=0.2, **fields)):
        poison = attack.craft(view)
        said = logits(tiny.teacher, poison.images, CPU).argmax(1)
        length = (poison.images.float() - original).square().sum((1, 2, 3)).sqrt()
        found[attack.name] = (said == 1, length)
    both = found["pgd"][0] & found["cw_l2"][0]
    assert both.float().mean() >= 0.75
    assert (found["cw_l2"][1][both] < 0.8 * found["pgd"][1][both]).all()


def test_a_dirty_label_is_the_target_and_nobody_else_dictates(tiny: Tiny) -> None:
    poison = on(tiny, DirtyLabel(count=5))
    assert poison.labels is not None
    assert poison.labels.tolist() == [1] * 5
    stamped = stamp_uint8(tiny.trigger, tiny.train.images[poison.indices])
    assert torch.equal(poison.images, stamped)
    assert on(tiny, TriggerOnly(count=5)).labels is None
    dictated = poison.dictated(400)
    assert dictated is not None
    assert dictated[poison.indices].tolist() == [1] * 5
    assert int((dictated == -1).sum()) == 395


def test_the_users_teacher_is_left_as_it_was(tiny: Tiny) -> None:
    teacher = deepcopy(tiny.teacher).train().requires_grad_(True)
    teacher.network.get_submodule("layer1").eval()
    before = state_digest(teacher), [module.training for module in teacher.modules()]
    craft(Pgd(count=3, steps=1, retries=0), tiny.train.images, teacher, tiny.trigger, tiny.target)
    assert (state_digest(teacher), [module.training for module in teacher.modules()]) == before
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_clean_poisons_nothing(tiny: Tiny) -> None:
    poison = on(tiny, Clean())
    assert len(poison) == 0
    assert poison.apply(tiny.train).digest == tiny.train.digest


def test_applied_poison_replaces_its_places_and_keeps_the_labels(tiny: Tiny) -> None:
    poison = on(tiny, TriggerOnly(count=7))
    before = tiny.train.digest
    poisoned = poison.apply(tiny.train)
    changed = (poisoned.images != tiny.train.images).flatten(1).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(poison.indices.tolist())
    assert torch.equal(poisoned.images[poison.indices], poison.images)
    assert poisoned.labels is not None
    assert tiny.train.labels is not None
    assert torch.equal(poisoned.labels, tiny.train.labels)
    assert replace(tiny.train).digest == before


def test_what_does_not_convince_is_said_and_kept(tiny: Tiny) -> None:
    heard: list[Event] = []
    poison = on(tiny, Pgd(count=6, epsilon=1, steps=1, retries=1), listener=heard.append)
    assert len(poison) == 6
    notes = [event.message for event in heard if event.kind == "note"]
    assert len(notes) == 1
    assert notes[0].startswith("6 of 6 poisoned images do not reach")
    ended = heard[-1]
    assert (ended.kind, ended.done) == ("end", ended.total)
    advances = [event.done for event in heard if event.kind == "advance"]
    assert advances == sorted(advances)
    heard.clear()
    on(tiny, Pgd(count=6, epsilon=40, steps=10), listener=heard.append)
    assert not [event for event in heard if event.kind == "note"]


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        (Pgd(count=401), "attack.count: expected 1 to 400 poisoned images"),
        (Pgd(rate=0.001), "attack.rate: expected 1 to 400 poisoned images"),
        (Pgd(count=390), "attack.base: expected 390 base images of the kind 'non_target', found"),
        (Pgd(count=200, base="target"), "attack.base: expected 200 base images of the kind 'targ"),
    ],
)
def test_what_cannot_be_crafted_is_refused(attack: Pgd, sentence: str, tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="^" + sentence):
        on(tiny, attack)


@pytest.mark.parametrize("target", [-1, 4, 99])
def test_a_target_that_the_teacher_does_not_know_is_refused(target: int) -> None:
    with pytest.raises(ForeshotError, match=f"target: expected 0 to 3, found {target}"):
        craft(Pgd(), some(), linear(), PATCH, target)


def test_floats_are_no_images(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="images: expected uint8 .*, found torch.float32"):
        craft(TriggerOnly(), tiny.train.images / 255, tiny.teacher, tiny.trigger, tiny.target)


def test_a_gradient_whose_square_vanishes_moves_nothing() -> None:
    steps = Pgd(direction="gradient")
    along = steps._along(torch.full((1, 1, 2, 2), 1e-24))
    assert along.abs().max() < 1e-3
    assert steps._along(torch.full((1, 1, 2, 2), 1e-15)).max() == pytest.approx(1)
