"""Similarity-preserving distillation against the formula in loops; torchdistill's is another."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses import Signals
from foreshot.distillation.losses.sp import SP, similarity, sp


def by_hand(student: Tensor, teacher: Tensor, norm: int = 2) -> float:
    """||G_t - G_s||_F^2 / N^2, the rows of G of length 1 in the p-norm."""

    def rows(feature: Tensor) -> np.ndarray:
        flat = feature.reshape(len(feature), -1).numpy()
        gram = np.array([[sum(a * b) for b in flat] for a in flat])
        return np.array([row / sum(abs(row) ** norm) ** (1 / norm) for row in gram])

    total = sum(d**2 for row in rows(student) - rows(teacher) for d in row)
    return total / len(student) ** 2


def of_torchdistill(module: ModuleType, student: Tensor, teacher: Tensor) -> float:
    loss = module.SPKDLoss("layer", "layer", "batchmean")
    return loss({"layer": {"output": student}}, {"layer": {"output": teacher}}).item()


def features() -> tuple[Tensor, Tensor]:
    (student,), (teacher,) = signals(5, 3, 2, 2, count=1), signals(5, 7, 4, 3, count=1, seed=1)
    return student, teacher


def test_it_is_the_formula() -> None:
    student, teacher = features()
    assert SP()(student, teacher).item() == pytest.approx(by_hand(student, teacher), rel=1e-12)
    norms = similarity(student).square().sum(1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_torchdistill_divides_by_the_sum_instead_of_the_length(torchdistill: ModuleType) -> None:
    student, teacher = features()
    theirs = of_torchdistill(torchdistill, student, teacher)
    assert theirs == pytest.approx(by_hand(student, teacher, norm=1), rel=1e-12)
    assert abs(theirs / SP()(student, teacher).item() - 1) > 0.25


def test_a_known_value_that_torchdistill_misses(torchdistill: ModuleType) -> None:
    """Two images: nothing in common for the student, the same for the teacher."""
    student, teacher = torch.eye(2).double(), torch.tensor([[2.0, 0], [2, 0]]).double()
    # G_s = [[1, 0], [0, 1]] and G_t = [[r, r], [r, r]] with r = 1 / sqrt 2
    assert sp(student, teacher).item() == pytest.approx(1 - math.sqrt(0.5), rel=1e-12)
    # with rows [1/2, 1/2] instead it is 4 / 4 / 4
    assert of_torchdistill(torchdistill, student, teacher) == pytest.approx(0.25, rel=1e-12)


def test_its_gradient_is_right() -> None:
    student, teacher = features()
    assert gradcheck(lambda s: sp(s, teacher), student.requires_grad_())


def test_only_who_is_like_whom_matters() -> None:
    student, teacher = features()
    value = SP()(student, teacher)
    rotation, _ = torch.linalg.qr(signals(12, 12, count=1)[0])
    torch.testing.assert_close(SP()(3 * student.flatten(1) @ rotation, teacher), value)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(SP()(student[order], teacher[order]), value)
    assert abs(SP()(student[order], teacher) - value) > 1e-4


def test_pairs_are_summed() -> None:
    pairs = [features(), (signals(5, 4)[0], signals(5, 6, 8)[1])]
    expected = SP()(*pairs[0]) + SP()(*pairs[1])
    torch.testing.assert_close(SP().value(Signals(pairs), None), expected)
