"""Target images made hard: against a naive loop, and judged by another student."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import Rule, Tiny, posed, seen
from foreshot.attacks import LabelConsistent, Noise, Problem
from foreshot.attacks.surrogate import surrogate
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.models import ResNet
from foreshot.training import Training
from foreshot.triggers.base import stamp_uint8

SMALL: dict[str, Any] = {
    "student": ResNet(depth=8, width=0.5, stem_stride=2),
    "training": Training(epochs=8, batch=40, lr=0.1),
    "steps": 10,
}


def linear(key: int) -> Rule:
    random = torch.Generator().manual_seed(key)
    weights = torch.randn((144, 4), generator=random) / 12
    return Rule(lambda x: x.flatten(1) @ weights.to(x))


def problem_of(tiny: Tiny, attack: LabelConsistent, effort: int = 0) -> Problem:
    view = seen(tiny, students=(linear(1), linear(2)))
    return posed(attack, view, 6, effort)


def test_it_climbs_the_mean_loss_of_the_students(tiny: Tiny, keep_rng: None) -> None:
    attack = LabelConsistent(epsilon=10, steps=5, step=3, random_start=False, temperature=2)
    found = attack.perturb(problem_of(tiny, attack)) * 255
    home = tiny.train.images[:6].double()  # the trigger comes after
    x = home.clone()
    for _ in range(5):
        x.requires_grad_()
        loss = torch.zeros(())
        for student in (linear(1), linear(2)):
            said = student(x / 255) / 2
            loss = loss + (said.logsumexp(1) - said[:, tiny.target]).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        x = (x.detach() + 3 * gradient.sign()).clamp(home - 10, home + 10).clamp(0, 255)
    assert (found - x).abs().max() < 0.01


def test_a_retry_goes_half_as_far(tiny: Tiny, keep_rng: None) -> None:
    attack = LabelConsistent(epsilon=16, steps=5)
    first, second, third = (attack.perturb(problem_of(tiny, attack, n)) for n in range(3))
    start = problem_of(tiny, attack).start
    assert (first - start).abs().amax() * 255 == pytest.approx(16, abs=0.01)
    assert torch.allclose(second - start, (first - start) / 2, atol=1e-6)
    assert torch.allclose(third - start, (first - start) / 4, atol=1e-6)


def test_the_teacher_recognises_what_a_student_does_not(tiny: Tiny, keep_rng: None) -> None:
    """The student is the attacker's own; on a problem as small as this, another is not fooled."""
    attack = LabelConsistent(count=40, epsilon=32, **SMALL)
    poison = attack.craft(seen(tiny))
    plain = tiny.train.images[poison.indices]
    assert (logits(tiny.teacher, plain, CPU).argmax(1) == tiny.target).all()
    assert (logits(tiny.teacher, poison.images, CPU).softmax(1)[:, tiny.target] >= 0.5).all()
    opaque = tiny.trigger.opaque(tiny.train.shape)
    assert torch.equal(poison.images[:, opaque], stamp_uint8(tiny.trigger, plain)[:, opaque])
    student = surrogate(seen(tiny), attack.student, attack.training)
    noise = Noise(epsilon=32, trigger="after").craft(seen(tiny, bases=poison.indices))

    def heed(images: Tensor) -> float:
        return F.softmax(logits(student, images, CPU), 1)[:, tiny.target].mean().item()

    assert heed(noise.images) > 0.95
    assert heed(poison.images) < 0.5 * heed(noise.images)


def test_more_images_than_the_target_has_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="expected 200 base images of the kind 'target', found"):
        LabelConsistent(rate=0.5, **{**SMALL, "training": Training(epochs=1)}).craft(seen(tiny))
