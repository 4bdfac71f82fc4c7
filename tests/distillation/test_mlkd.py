"""MLKD against its formula in loops."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation import kd
from foreshot.distillation.losses.mlkd import MLKD, gram_distance, mlkd


def by_hand(student: Tensor, teacher: Tensor, temperatures: tuple[float, ...]) -> float:
    images, classes = student.shape
    total = 0.0
    for temperature in temperatures:
        powers = [np.exp(logits.numpy() / temperature) for logits in (student, teacher)]
        p, q = (power / power.sum(1, keepdims=True) for power in powers)
        for i, k in product(range(images), range(classes)):
            total += temperature**2 * q[i, k] * np.log(q[i, k] / p[i, k]) / images
        for i, j in product(range(images), repeat=2):
            total += (sum(q[i] * q[j]) - sum(p[i] * p[j])) ** 2 / images
        for k, m in product(range(classes), repeat=2):
            total += (sum(q[:, k] * q[:, m]) - sum(p[:, k] * p[:, m])) ** 2 / classes
    return float(total)


@pytest.mark.parametrize("temperatures", [(1.0,), (0.7, 4.0), (2.0, 3.0, 4.0, 5.0, 6.0)])
def test_it_is_the_formula(temperatures: tuple[float, ...]) -> None:
    student, teacher = (3 * z for z in signals(7, 5))
    expected = by_hand(student, teacher, temperatures)
    assert mlkd(student, teacher, temperatures).item() == pytest.approx(expected, rel=1e-9)
    value = MLKD(temperatures=temperatures)(student, teacher)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_its_gradient_is_right() -> None:
    student, teacher = signals(5, 4)
    assert gradcheck(lambda s: MLKD()(s, teacher), student.requires_grad_())


def test_its_default_is_the_papers_and_each_temperature_adds_its_own() -> None:
    student, teacher = signals(6, 5)
    each = [mlkd(student, teacher, [t]) for t in (2, 3, 4, 5, 6)]
    torch.testing.assert_close(MLKD()(student, teacher), torch.stack(each).sum())


def test_a_level_sees_what_the_divergence_does_not() -> None:
    """Students of certain answers: who swaps two classes relates the images as the teacher does;
    who swaps two images relates the classes as the teacher does.
    """
    teacher = torch.eye(3).double()[[0, 0, 1, 2]]
    classes = teacher[:, [1, 0, 2]]
    images = teacher[[2, 1, 0, 3]]
    assert gram_distance(classes, teacher).item() == pytest.approx(0)
    # Classes of 2 and 1 images change places: each product is off by 1, over K = 3.
    assert gram_distance(classes.T, teacher.T).item() == pytest.approx((1 + 1) / 3)
    assert gram_distance(images.T, teacher.T).item() == pytest.approx(0)
    # Image 1 was like image 0 and is like image 2: four entries of the matrix change, over N = 4.
    assert gram_distance(images, teacher).item() == pytest.approx(4 / 4)


def test_equal_answers_cost_nothing_and_a_shift_of_all_logits_is_no_difference() -> None:
    student, teacher = signals(6, 5)
    loss = MLKD()
    assert loss(student, student + 7).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, teacher) > sum(kd(student, teacher, t) for t in (2, 3, 4, 5, 6))


@pytest.mark.parametrize("temperatures", [(), (0.0,), (2.0, -1.0)])
def test_temperatures_are_positive_and_some(temperatures: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="temperatures"):
        MLKD(temperatures=temperatures)
