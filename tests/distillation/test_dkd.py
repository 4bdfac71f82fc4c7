"""DKD against its formula in loops, and its two parts against Hinton's loss, which they make up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation import kd
from foreshot.distillation.losses.dkd import DKD, nckd, tckd

Y = torch.tensor([0, 3, 4, 1, 3, 2])


def by_hand(student: Tensor, teacher: Tensor, y: Tensor, temperature: float) -> list[list[float]]:
    """T^2 * KL of target against the rest and of the rest, for each image, in plain Python."""

    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp((z - max(row)) / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    def divergence(p: list[float], q: list[float]) -> float:
        return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    parts = []
    for mine, theirs, k in zip(student.tolist(), teacher.tolist(), y.tolist(), strict=True):
        q, p = softmax(mine), softmax(theirs)
        rest = [[v / (1 - row[k]) for i, v in enumerate(row) if i != k] for row in (p, q)]
        target = divergence([p[k], 1 - p[k]], [q[k], 1 - q[k]])
        parts.append([target, divergence(*rest)])
    return parts


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_it_is_the_formula(temperature: float) -> None:
    student, teacher = (3 * z for z in signals(6, 5))
    parts = by_hand(student, teacher, Y, temperature)
    target, others = torch.tensor(parts, dtype=torch.float64).mean(0)
    torch.testing.assert_close(tckd(student, teacher, Y, temperature), target, rtol=1e-9, atol=0)
    torch.testing.assert_close(nckd(student, teacher, Y, temperature), others, rtol=1e-9, atol=0)
    value = DKD(alpha=0.3, beta=2, temperature=temperature)(student, teacher, Y)
    torch.testing.assert_close(value, 0.3 * target + 2 * others, rtol=1e-9, atol=0)


@given(
    seed=st.integers(0, 99),
    classes=st.integers(2, 7),
    temperature=st.floats(0.5, 20),
    size=st.floats(0.1, 8),
)
@settings(deadline=None, max_examples=60)
def test_hintons_loss_weighs_the_others_by_the_teachers_doubt(
    seed: int, classes: int, temperature: float, size: float
) -> None:
    """KD = TCKD + (1 - p_y) * NCKD for each image (the paper's equation 7)."""
    student, teacher = (size * z for z in signals(4, classes, seed=seed))
    y = torch.arange(4) % classes
    doubt = 1 - (teacher / temperature).softmax(1).gather(1, y[:, None])[:, 0]
    images = [(student[i : i + 1], teacher[i : i + 1], y[i : i + 1]) for i in range(4)]
    whole = [
        tckd(*image, temperature) + weight * nckd(*image, temperature)
        for image, weight in zip(images, doubt, strict=True)
    ]
    expected = kd(student, teacher, temperature)
    torch.testing.assert_close(torch.stack(whole).mean(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 4.0])
def test_its_gradient_is_right(temperature: float) -> None:
    student, teacher = signals(6, 5)
    loss = DKD(temperature=temperature)
    assert gradcheck(lambda s: loss(s, teacher, Y), student.requires_grad_())


def test_each_part_is_blind_to_the_other() -> None:
    """Logits of the others, moved by a constant, or of the target, change only the target's part;
    the others stirred so that their sum of powers stays, only the others' part.
    """
    student, teacher = signals(6, 5)
    target = torch.nn.functional.one_hot(Y, 5)
    surer = student + 2.5 * target
    assert nckd(surer, teacher, Y, 4).item() == pytest.approx(nckd(student, teacher, Y, 4).item())
    assert tckd(surer, teacher, Y, 4).item() != pytest.approx(tckd(student, teacher, Y, 4).item())
    stirred = student.clone()
    for row, y in zip(stirred, Y.tolist(), strict=True):
        others = [k for k in range(5) if k != y]
        row[others] = row[others].roll(1)
    assert tckd(stirred, teacher, Y, 4).item() == pytest.approx(tckd(student, teacher, Y, 4).item())
    assert nckd(stirred, teacher, Y, 4).item() != pytest.approx(nckd(student, teacher, Y, 4).item())


def test_a_teacher_without_doubt_still_teaches_the_others() -> None:
    """In float32, p_y = 1: Hinton's loss has forgotten the other classes, and DKD has not."""
    student, teacher = torch.tensor([[200.0, 1, 2, 3]]), torch.tensor([[200.0, 3, 2, 1]])
    y = torch.tensor([0])
    assert kd(student, teacher, 1.0).item() == 0
    p, q = torch.tensor([1.0, 2, 3]).softmax(0), torch.tensor([3.0, 2, 1]).softmax(0)
    expected = (q * (q / p).log()).sum()
    torch.testing.assert_close(nckd(student.requires_grad_(), teacher, y, 1.0), expected)
    (gradient,) = torch.autograd.grad(DKD(temperature=1)(student, teacher, y), student)
    torch.testing.assert_close(gradient[0, 1:], 8 * (p - q))


def test_single_precision_is_exact_to_a_millionth() -> None:
    student, teacher = (3 * z for z in signals(60, 5))
    y, loss = Y.repeat(10), DKD()
    exact = loss(student, teacher, y).item()
    assert loss(student.float(), teacher.float(), y).item() == pytest.approx(exact, rel=1e-6)
