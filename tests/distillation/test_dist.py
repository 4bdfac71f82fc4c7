"""DIST against numpy's correlation and against torchdistill."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses.dist import DIST, dist, unrelated


def by_hand(
    student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float
) -> float:
    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits / temperature)
        return powers / powers.sum(1, keepdims=True)

    p, q = softmax(student.numpy()), softmax(teacher.numpy())
    images = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    classes = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)]
    return float(temperature**2 * (beta * np.mean(images) + gamma * np.mean(classes)))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_the_formula(
    weights: tuple[float, float], temperature: float, torchdistill: ModuleType
) -> None:
    student, teacher = (3 * z for z in signals(7, 5))
    value = dist(student, teacher, *weights, temperature).item()
    assert value == pytest.approx(by_hand(student, teacher, *weights, temperature), rel=1e-9)
    oracle = torchdistill.DISTLoss("z", "output", "z", "output", *weights, tau=temperature)
    theirs = oracle({"z": {"output": student}}, {"z": {"output": teacher}}).item()
    assert value == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_its_gradient_is_right(temperature: float) -> None:
    student, teacher = signals(6, 4)
    loss = DIST(beta=0.7, gamma=1.3, temperature=temperature)
    assert gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


def test_a_correlation_knows_no_scale_and_no_shift() -> None:
    one, other = signals(6, 4)
    distance = unrelated(one, other).item()
    assert 0 < distance < 2
    assert unrelated(3 * one - 7, 0.1 * other + 2).item() == pytest.approx(distance)
    assert unrelated(one, 5 * one + 1).item() == pytest.approx(0, abs=1e-12)
    assert unrelated(one, -one).item() == pytest.approx(2)


def test_two_classes_agree_or_disagree() -> None:
    """Two probabilities correlate with 1 or -1; here two of four images disagree."""
    student = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    teacher = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
    assert dist(student, teacher, 1, 0, 1).item() == pytest.approx(0.5 * 2)
    assert dist(student, teacher, 0, 1, 1).item() == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 4])
def test_rows_without_spread_have_a_finite_gradient(count: int) -> None:
    """One image alone, and a student that says the same of all of them."""
    student, teacher = torch.zeros(count, 5), torch.randn(count, 5, generator=torch.manual_seed(0))
    value = DIST(temperature=1)(student.requires_grad_(), teacher)
    assert value.item() == pytest.approx(2, abs=1e-5)
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
