"""Crafting through transformations: against its formula, and against what the teacher then says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import Tiny, posed, seen
from foreshot.attacks import Counterfactual, Eot, Pgd
from foreshot.compute import CPU
from foreshot.inference import logits
from foreshot.levels import to_float, to_uint8
from foreshot.seeding import generator
from foreshot.transforms import Transform, transform
from foreshot.views import AttackerView


def test_the_objective_is_the_mean_over_what_is_drawn(tiny: Tiny) -> None:
    kinds: tuple[Transform, ...] = ("crop", "blur", "none")
    attack, view = Eot(through=kinds, draws=2, temperature=3), seen(tiny)
    problem = posed(attack, view, 6)
    for step in range(4):
        expected = []
        for number in (2 * step, 2 * step + 1):
            random = generator(0, "poison", "through", 0, number)
            said = tiny.teacher(transform(problem.start, kinds[number % 3], random))
            expected.append(-F.log_softmax(said / 3, 1)[:, tiny.target].sum())
        found = attack.objective(problem)(problem.start, step)
        torch.testing.assert_close(found, torch.stack(expected).mean())


def test_through_nothing_it_is_pgd(tiny: Tiny) -> None:
    fields = {"count": 8, "epsilon": 20, "steps": 5, "retries": 0}
    one = Eot.model_validate({**fields, "through": ["none"], "draws": 1}).craft(seen(tiny))
    assert one.digest == Pgd.model_validate(fields).craft(seen(tiny)).digest


@pytest.mark.parametrize("kind", ["crop", "blur", "jpeg", "noise"])
def test_the_poison_outlasts_what_it_was_crafted_through(kind: Transform, tiny: Tiny) -> None:
    fields = {"count": 40, "epsilon": 32, "steps": 30, "retries": 0}
    surprise: list[float] = []
    for attack in (Eot.model_validate({**fields, "through": [kind]}), Pgd.model_validate(fields)):
        images = to_float(attack.craft(seen(tiny)).images)

        def loss(key: int, images: Tensor = images) -> float:
            changed = to_uint8(transform(images, kind, generator(key, "other")))
            return -float(logits(tiny.teacher, changed, CPU).log_softmax(1)[:, tiny.target].mean())

        surprise.append(sum(map(loss, range(20))) / 20)
    assert surprise[0] < 0.9 * surprise[1]


def test_what_is_kept_is_what_the_teacher_is_sure_of_after_changes(tiny: Tiny) -> None:
    kinds: tuple[Transform, ...] = ("crop", "none", "blur")
    attack, view = Eot(through=kinds), seen(tiny)
    problem = posed(attack, view, 5)
    stored, rows = view.images[:5], [view.images[:5]]
    for number in range(16):
        random = generator(0, "poison", "judged", number)
        kind: Transform = ("crop", "blur")[number % 2]
        rows.append(to_uint8(transform(to_float(stored), kind, random)))
    said = [logits(tiny.teacher, row, CPU).softmax(1)[:, tiny.target] for row in rows]
    expected = torch.stack(said).mean(0).log().double()
    torch.testing.assert_close(attack.conviction(problem, stored), expected)


def test_counterfactual_crafting_measures_both_terms_on_the_changed_image(tiny: Tiny) -> None:
    attack = Counterfactual(through=("crop",), draws=1, weight=0.2, temperature=2)
    view = AttackerView(
        tiny.train.images, tiny.teacher, tiny.trigger, tiny.target, 0, CPU, students=(tiny.teacher,)
    )
    problem = posed(attack, view, 5)
    x = problem.hold(problem.start + 0.05 * (problem.noise() - 0.5))
    x_seen, start_seen = (
        transform(images, "crop", generator(0, "poison", "through", 0, 7))
        for images in (x, problem.start)
    )
    said, before = tiny.teacher(x_seen), tiny.teacher(start_seen)
    moved = (said - said.mean(1, keepdim=True)) - (before - before.mean(1, keepdim=True))
    convinced = -F.log_softmax(said / 2, 1)[:, tiny.target].sum()
    expected = convinced + 0.2 * moved.square().sum()
    torch.testing.assert_close(attack.objective(problem)(x, 7), expected)
