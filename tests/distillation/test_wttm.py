"""WTTM against its formula in loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation import kd
from foreshot.distillation.losses.wttm import WTTM, wttm


def by_hand(student: Tensor, teacher: Tensor, gamma: float) -> float:
    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(z) for z in row]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, powers = softmax(mine), [q**gamma for q in softmax(theirs)]
        weight = sum(powers)
        total += weight * sum(
            q / weight * math.log(q / weight / a) for a, q in zip(p, powers, strict=True)
        )
    return total / len(student)


@pytest.mark.parametrize("gamma", [0.1, 0.2, 0.8, 1.0])
def test_it_is_the_formula(gamma: float) -> None:
    student, teacher = (3 * z for z in signals(7, 5))
    expected = by_hand(student, teacher, gamma)
    assert wttm(student, teacher, gamma).item() == pytest.approx(expected, rel=1e-9)
    assert WTTM(gamma=gamma)(student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.2, 0.8])
def test_its_gradient_is_the_weighted_difference_of_probabilities(gamma: float) -> None:
    """U * (p - softmax(gamma z_t)) / N: the student is at T = 1, so no T^2 is wanted."""
    student, teacher = signals(6, 5)
    assert gradcheck(lambda s: wttm(s, teacher, gamma), student.requires_grad_())
    (gradient,) = torch.autograd.grad(wttm(student, teacher, gamma), student)
    weight = teacher.softmax(1).pow(gamma).sum(1, keepdim=True)
    difference = student.softmax(1) - (gamma * teacher).softmax(1)
    torch.testing.assert_close(gradient, weight * difference / 6)


def test_an_exponent_of_one_leaves_hintons_loss_at_one() -> None:
    student, teacher = signals(6, 5)
    torch.testing.assert_close(wttm(student, teacher, 1.0), kd(student, teacher, 1.0))


def test_a_smooth_teacher_weighs_most_and_a_certain_one_least() -> None:
    """U is K^(1 - gamma) where all classes are alike, and 1 for a certain class, even float32's."""
    student, gamma = torch.tensor([[1.0, 0, -1, 2]]), 0.5
    smooth = wttm(student, torch.zeros(1, 4), gamma)
    divergence = (math.log(0.25) - student.log_softmax(1)).mean()
    torch.testing.assert_close(smooth, 4**0.5 * divergence)
    certain = 500 * torch.tensor([[0.0, 1, 0, 0]])
    torch.testing.assert_close(
        wttm(student, certain, gamma), F.cross_entropy(student, torch.tensor([1]))
    )
