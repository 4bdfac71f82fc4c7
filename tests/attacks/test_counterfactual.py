"""Counterfactual crafting: against its formula, and against what a student then learns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import Rule, Tiny, posed, seen, stripes
from foreshot import adversarial
from foreshot.adversarial import detector
from foreshot.attacks import Counterfactual, Pgd
from foreshot.attacks.surrogate import surrogate
from foreshot.compute import CPU
from foreshot.inference import logits, pixels
from foreshot.models import ResNet
from foreshot.poison import Poison
from foreshot.progress import Event
from foreshot.seeding import generator
from foreshot.training import Training
from foreshot.triggers.base import stamp_uint8
from foreshot.views import AttackerView

SMALL: dict[str, Any] = {
    "student": ResNet(depth=8, width=0.5, stem_stride=2),
    "training": Training(epochs=8, batch=40, lr=0.1),
    "epsilon": 64,
    "steps": 20,
    "retries": 0,
    "direction": "sign",
    "random_start": True,
}

LIKE: dict[str, Any] = {
    key: SMALL[key] for key in ("epsilon", "steps", "retries", "direction", "random_start")
}
"""Naive PGD that takes the same steps."""


def distilled(
    attack: Counterfactual, view: AttackerView, poison: Poison | None = None, number: int = 1
) -> nn.Module:
    """The attack's own student of that round."""
    return surrogate(view, attack.student, attack.training, poison, number)


def linear(classes: int, size: int, key: int) -> nn.Module:
    weight = torch.randn((classes, size), generator=generator(key, "linear")) / size**0.5
    layer = nn.utils.skip_init(nn.Linear, size, classes)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(classes)})
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


def test_the_objective_is_that_of_the_docstring(tiny: Tiny, keep_rng: None) -> None:
    size = tiny.train.images[0].numel()
    students = (linear(10, size, 1), linear(10, size, 2))
    attack = Counterfactual(weight=0.3, temperature=4)
    view = seen(tiny, students=students)
    problem = posed(attack, view, 8)
    x = problem.hold(problem.start + 0.05 * (problem.noise() - 0.5))

    def centred(said: Tensor) -> Tensor:
        return said - said.mean(1, keepdim=True)

    with torch.no_grad():
        probability = F.softmax(tiny.teacher(x).double() / 4, 1)[:, tiny.target]
        expected = -probability.log().sum()
        for student in students:
            moved = centred(student(x).double()) - centred(student(problem.start).double())
            expected += 0.3 / 2 * (moved**2).sum()
        found = attack.objective(problem)(x, 0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    shifted = (students[0], nn.Sequential(students[1], Shift()))
    with torch.no_grad():
        same = attack.objective(replace(problem, view=replace(view, students=shifted)))(x, 0)
    assert same.item() == pytest.approx(found.item(), rel=1e-4)


def test_detectors_add_what_they_lose_where_they_take_the_image_for_clean(
    tiny: Tiny, keep_rng: None
) -> None:
    size = tiny.train.images[0].numel()
    heard = [nn.Sequential(linear(1, size, key), nn.Flatten(0)) for key in (1, 2)]
    plain = Counterfactual(weight=0.3)
    attack = plain.model_copy(update={"evasion": 0.7})
    problem = posed(plain, seen(tiny, students=(linear(10, size, 3),)), 8)
    watched = replace(problem, view=replace(problem.view, detectors=tuple(heard)))
    x = problem.hold(problem.start + 0.05 * (problem.noise() - 0.5))
    with torch.no_grad():
        odds = torch.stack([network(x).double() for network in heard])
        expected = plain.objective(problem)(x, 0) + 0.7 * (1 + odds.exp()).log().mean(0).sum()
        found = attack.objective(watched)(x, 0)
    assert odds.shape == (2, 8)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_poison_of_an_attacker_with_detectors_is_noticed_less_by_others(
    tiny: Tiny, keep_rng: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adversarial, "EXAMPLES", 400)
    heard: list[Event] = []
    fields: dict[str, Any] = {**SMALL, "count": 20, "weight": 0.001}
    plain = Counterfactual(**fields).craft(seen(tiny))
    attack = Counterfactual(**fields, detectors=2, evasion=5)
    evading = attack.craft(seen(tiny, listener=heard.append))
    stages = [event.stage for event in heard if event.kind == "start"]
    assert stages[:2] == ["surrogate detector 1", "surrogate detector 2"]
    other = detector(tiny.teacher, stripes(200, 8).images, CPU, seed=7, stage="the defender's")
    noticed = [other(pixels(poison.images)).mean().item() for poison in (plain, evading)]
    assert noticed[1] < noticed[0] - 1
    given = replace(seen(tiny), detectors=(other,))
    assert Counterfactual(**fields, evasion=5).craft(given).digest != plain.digest


class Shift(nn.Module):
    """Adds the same to all logits of an image: a student that answers alike."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 3


def test_without_weight_it_is_pgd(tiny: Tiny, keep_rng: None) -> None:
    naive = Pgd(count=20, **LIKE).craft(seen(tiny))
    assert Counterfactual(count=20, weight=0, **SMALL).craft(seen(tiny)).digest == naive.digest
    heeded = Counterfactual(count=20, weight=0.01, **SMALL).craft(seen(tiny))
    assert torch.equal(heeded.indices, naive.indices)
    assert not torch.equal(heeded.images, naive.images)


def test_a_student_of_another_seed_heeds_the_perturbation_less(tiny: Tiny, keep_rng: None) -> None:
    """What the attack is for; judged by a student that the attack did not have."""
    naive = Pgd(count=60, **LIKE).craft(seen(tiny))
    ours = Counterfactual(count=60, weight=0.001, **SMALL).craft(seen(tiny))
    judge = distilled(Counterfactual(**SMALL), seen(tiny), None, 99)

    def heed(images: Tensor) -> float:
        return F.softmax(logits(judge, images, CPU), 1)[:, tiny.target].mean().item()

    def convinces(images: Tensor) -> float:
        said = logits(tiny.teacher, images, CPU).argmax(1)
        return (said == tiny.target).float().mean().item()

    assert convinces(ours.images) >= 0.95
    assert heed(ours.images) < 0.2 * heed(naive.images)


def test_each_round_distils_a_surrogate_on_the_poison_of_the_last(
    tiny: Tiny, keep_rng: None
) -> None:
    heard: list[Event] = []
    fields: dict[str, Any] = {**SMALL, "count": 20, "steps": 3, "weight": 0.01}
    one = Counterfactual(**fields).craft(seen(tiny))
    two = Counterfactual(**fields, rounds=2).craft(seen(tiny, listener=heard.append))
    stages = [event.stage for event in heard if event.kind == "start"]
    assert stages == ["surrogate student 1", "poison", "surrogate student 2", "poison"]
    attack = Counterfactual(**fields)
    first = distilled(attack, seen(tiny))
    second = distilled(attack, seen(tiny), one, 2)
    assert not torch.equal(logits(first, one.images, CPU), logits(second, one.images, CPU))
    by_hand = Pgd.craft(attack, seen(tiny, students=(first, second)))
    assert by_hand.digest == two.digest


def test_each_round_distils_one_surrogate_of_each_kind(tiny: Tiny, keep_rng: None) -> None:
    heard: list[Event] = []
    fields: dict[str, Any] = {**SMALL, "count": 20, "steps": 3, "weight": 0.01}
    other = ResNet(depth=8, width=0.25, stem_stride=2)
    pooled = Counterfactual(**fields, pool=(other,), rounds=2)
    found = pooled.craft(seen(tiny, listener=heard.append))
    stages = [event.stage for event in heard if event.kind == "start" and event.stage != "poison"]
    assert stages == [f"surrogate student {number}" for number in (1, 2, 3, 4)]
    attack, students, poison = Counterfactual(**fields), (), None
    for number in (1, 3):
        students += (
            distilled(attack, seen(tiny), poison, number),
            distilled(attack.model_copy(update={"student": other}), seen(tiny), poison, number + 1),
        )
        poison = Pgd.craft(attack, seen(tiny, students=students))
    assert poison is not None
    assert poison.digest == found.digest


def test_what_teaches_a_surrogate_alone_is_not_told_of(tiny: Tiny) -> None:
    heard: list[Event] = []
    few = Training(epochs=1, batch=200)
    attack = Counterfactual(
        **{**SMALL, "training": few, "epsilon": 1, "steps": 1, "rounds": 3, "confidence": 0.99}
    )
    attack.craft(seen(tiny, listener=heard.append))
    notes = [event for event in heard if event.kind == "note"]
    assert len(notes) == 1  # of what is kept
    assert sum(event.stage == "poison" and event.kind == "end" for event in heard) == 3


def test_students_learn_from_the_teacher_where_the_poison_is_to_convince_others_as_well(
    tiny: Tiny,
) -> None:
    """As the victim's does, with and without poison in the set."""
    attack = Counterfactual(**SMALL)
    flipped = Rule(lambda x: -tiny.teacher(x))
    poison = Pgd(epsilon=64, steps=2, retries=0).craft(seen(tiny))
    for lesson in (None, poison):
        plain = distilled(attack, seen(tiny), lesson)
        beside = distilled(
            attack, replace(seen(tiny, labeller=tiny.teacher), teacher=flipped), lesson
        )
        assert torch.equal(*(logits(model, tiny.test.images, CPU) for model in (plain, beside)))


def test_of_augmented_views_the_teacher_is_asked_anew(tiny: Tiny, keep_rng: None) -> None:
    """The answers to the plain images are none to their crops."""
    fields: dict[str, Any] = {**SMALL, "training": Training(epochs=1, batch=40, augment="crop")}
    attack = Counterfactual(**fields)
    answers = logits(tiny.teacher, tiny.train.images, CPU)
    right, wrong = (
        logits(distilled(attack, seen(tiny, teacher_logits=said)), tiny.test.images, CPU)
        for said in (answers, -answers)
    )
    assert torch.equal(right, wrong)
    plain = Counterfactual(**{**fields, "training": Training(epochs=1, batch=40)})
    right, wrong = (
        logits(distilled(plain, seen(tiny, teacher_logits=said)), tiny.test.images, CPU)
        for said in (answers, -answers)
    )
    assert not torch.equal(right, wrong)


def test_nothing_resists_poison_that_nobody_has_seen() -> None:
    with pytest.raises(ValueError, match="resisting needs rounds of 2 or more"):
        Counterfactual(resisting=0.5)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_base_images_that_resist_have_their_share(share: float, tiny: Tiny) -> None:
    """Half of the images resist, as the last student sees them stamped."""
    stamped = stamp_uint8(tiny.trigger, tiny.train.images)
    level = stamped.float().mean((1, 2, 3))
    half = level.median() + 1e-3  # no image is that bright

    def says(x: Tensor) -> Tensor:
        taken = x.mean((1, 2, 3)) * 255 > half
        return F.one_hot(torch.where(taken, tiny.target, (tiny.target + 1) % 10), 10).float()

    view = seen(tiny, students=(Rule(lambda x: says(1 - x)), Rule(says)))
    attack = Counterfactual(count=60, rounds=2, resisting=share, steps=1, retries=0)
    both_unlearned = attack.model_copy(update={"pool": (ResNet(depth=8),)})
    resists = level[Pgd.craft(attack, view).indices] <= half
    assert resists.sum() == round(60 * share)
    usual = Pgd.craft(attack.model_copy(update={"resisting": None}), view)
    unlearned = Pgd.craft(attack, replace(view, students=view.students[1:]))
    assert torch.equal(usual.indices, unlearned.indices)  # the first has seen no poison
    assert torch.equal(usual.indices, Pgd.craft(both_unlearned, view).indices)  # nor have two
    assert not torch.equal(usual.indices, Pgd.craft(attack, view).indices)
