"""LSKD against numpy, and against torchdistill, whose deviation is that of a sample."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation import KD
from foreshot.distillation.losses.lskd import LSKD, z_score


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    def probabilities(row: np.ndarray) -> np.ndarray:
        powers = np.exp((row - row.mean()) / row.std(ddof=0) / temperature)
        return powers / powers.sum()

    total = 0.0
    for mine, theirs in zip(student.numpy(), teacher.numpy(), strict=True):
        p, q = probabilities(mine), probabilities(theirs)
        total += float((q * np.log(q / p)).sum())
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_it_is_the_formula(temperature: float) -> None:
    student, teacher = (3 * z for z in signals(7, 5))
    value = LSKD(temperature=temperature)(student, teacher).item()
    assert value == pytest.approx(by_hand(student, teacher, temperature), rel=1e-9)


def test_the_deviation_is_the_papers() -> None:
    """Over K, a z-score reaches sqrt(K - 1) and no more (the paper's boundedness)."""
    certain = torch.tensor([[9.0, 0, 0, 0, 0]], dtype=torch.float64)
    assert z_score(certain).max().item() == pytest.approx(math.sqrt(4))
    (logits,) = signals(6, 5, count=1)
    scores = z_score(7 * logits - 3)
    torch.testing.assert_close(scores.mean(1), torch.zeros(6).double())
    torch.testing.assert_close(scores.square().mean(1), torch.ones(6).double())


def test_torchdistill_takes_the_deviation_of_a_sample(torchdistill: ModuleType) -> None:
    """Theirs is ours at the temperature T * sqrt(K / (K - 1)); and it drops T^2 without labels."""
    student, teacher = (3 * z for z in signals(7, 5))
    temperature, weight, y = 2.0, 9.0, torch.arange(7) % 5
    oracle = torchdistill.LogitStdKDLoss(
        "z", "output", "z", "output", temperature, alpha=0.1, beta=weight
    )
    said = {"z": {"output": student}}, {"z": {"output": teacher}}
    hard = 0.1 * torch.nn.functional.cross_entropy(student, y)
    theirs = ((oracle(*said, y) - hard) / weight).item()
    assert LSKD(temperature=temperature)(student, teacher).item() != pytest.approx(theirs, rel=1e-3)
    matched = LSKD(temperature=temperature * math.sqrt(5 / 4))(student, teacher) / (5 / 4)
    assert matched.item() == pytest.approx(theirs, rel=1e-6)
    assert oracle(*said).item() == pytest.approx(theirs / temperature**2, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_its_gradient_is_right(temperature: float) -> None:
    student, teacher = signals(6, 5)
    loss = LSKD(temperature=temperature)
    assert gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


def test_shift_and_range_of_the_logits_are_no_difference() -> None:
    student, teacher = signals(6, 5)
    loss, spread = LSKD(), torch.linspace(0.1, 50, 6).double()[:, None]
    value = loss(student, teacher).item()
    assert loss(student * spread + 7, teacher / spread - 2).item() == pytest.approx(value)
    assert loss(teacher * spread + 7, teacher).item() == pytest.approx(0, abs=1e-10)
    assert KD()(teacher * spread, teacher).item() > 1


def test_logits_that_are_all_the_same_have_a_finite_gradient() -> None:
    student, teacher = torch.full((2, 5), 3.0, requires_grad=True), torch.eye(5)[:2]
    value = LSKD()(student, teacher)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
