"""Hinton's loss against the formula, written out, and its gradient against differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from foreshot.distillation import KD, kd

rows = st.integers(1, 4).flatmap(
    lambda n: st.integers(2, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.floats(-20, 20), min_size=2 * k, max_size=2 * k), min_size=n, max_size=n
        )
    )
)


def by_hand(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    """T^2 * sum p log(p / q), the mean over the images, in plain Python."""

    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp((z - max(row)) / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        q, p = softmax(mine), softmax(theirs)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return temperature**2 * total / len(student)


@given(values=rows, temperature=st.floats(0.5, 20))
@settings(deadline=None, max_examples=80)
def test_it_is_the_formula(values: list[list[float]], temperature: float) -> None:
    half = len(values[0]) // 2
    student, teacher = [row[:half] for row in values], [row[half:] for row in values]
    one, two = (torch.tensor(part, dtype=torch.float64) for part in (student, teacher))
    expected = by_hand(student, teacher, temperature)
    assert kd(one, two, temperature).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def pair(count: int = 5) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn((2, count, 4), generator=random, dtype=torch.float64) * 3
    return student, teacher


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_its_gradient_is_right(temperature: float) -> None:
    student, teacher = pair()
    assert gradcheck(lambda s: kd(s, teacher, temperature), student.requires_grad_())
    (gradient,) = torch.autograd.grad(kd(student, teacher, temperature), student)
    softened = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(gradient, temperature * softened / 5)


def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient() -> None:
    student, teacher = pair()
    student = (student - student.mean(1, keepdim=True)).requires_grad_()
    teacher = teacher - teacher.mean(1, keepdim=True)
    (gradient,) = torch.autograd.grad(kd(student, teacher, 1e4), student)
    # At a high temperature it is the squared difference of the logits (Hinton et al., eq. 4).
    torch.testing.assert_close(gradient, (student - teacher) / (5 * 4), rtol=1e-3, atol=1e-4)


def test_equal_answers_cost_nothing_and_a_shift_of_all_logits_is_no_difference() -> None:
    student, teacher = pair()
    loss = KD(temperature=3)
    assert loss(student, student).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, student + 7).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, teacher).item() > 0.1


def test_single_precision_is_exact_to_a_millionth() -> None:
    student, teacher = pair(64)
    exact = kd(student, teacher, 4.0).item()
    assert kd(student.float(), teacher.float(), 4.0).item() == pytest.approx(exact, rel=1e-6)
