"""PKT against plain loops, torchdistill and differences."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses.pkt import PKT, neighbours, pkt


def by_hand(student: Tensor, teacher: Tensor) -> float:
    """Passalis and Tefas, equations 4, 5, 7 and 8, in plain Python."""

    def probabilities(rows: list[list[float]]) -> list[list[float]]:
        def kernel(a: list[float], b: list[float]) -> float:
            product = sum(x * y for x, y in zip(a, b, strict=True))
            return (product / (math.hypot(*a) * math.hypot(*b)) + 1) / 2 + 1e-6

        similar = [[kernel(a, b) for b in rows] for a in rows]
        return [[value / sum(row) for value in row] for row in similar]

    p, q = probabilities(teacher.tolist()), probabilities(student.tolist())
    total = 0.0
    for ps, qs in zip(p, q, strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(ps, qs, strict=True))
    return total / len(p)


def test_it_is_the_formula() -> None:
    (student,), (teacher,) = signals(7, 5, count=1), signals(7, 9, count=1, seed=1)
    assert pkt(student, teacher).item() == pytest.approx(by_hand(student, teacher), rel=1e-12)


@pytest.mark.parametrize("count", [4, 32])
def test_it_is_torchdistills_times_the_batch(count: int, torchdistill: ModuleType) -> None:
    """Theirs is a mean over the N x N entries, so that a larger batch would be a smaller loss."""
    (student,), (teacher,) = signals(count, 8, count=1), signals(count, 12, count=1, seed=1)
    loss = torchdistill.PKTLoss("s", "output", "t", "output")
    theirs = loss({"s": {"output": student.clone()}}, {"t": {"output": teacher.clone()}})
    torch.testing.assert_close(PKT()(student, teacher), count * theirs, rtol=1e-5, atol=0)
    single = PKT()(student.float(), teacher.float()).item()
    assert single == pytest.approx(PKT()(student, teacher).item(), rel=1e-4)


def test_a_batch_twice_over_has_the_same_loss() -> None:
    student, teacher = signals(6, 5)
    once, twice = pkt(student, teacher), pkt(student.repeat(2, 1), teacher.repeat(2, 1))
    assert twice.item() == pytest.approx(once.item(), rel=1e-9)


def test_its_gradient_is_right() -> None:
    student, teacher = signals(5, 4)
    assert gradcheck(lambda s: PKT()(s, teacher), student.requires_grad_())


def test_turns_and_lengths_are_no_difference_and_equal_images_are() -> None:
    student, teacher = signals(6, 5)
    turn = torch.linalg.qr(signals(5, 5, count=1, seed=2)[0]).Q
    lengths = torch.arange(1, 7)[:, None]
    assert pkt(student, lengths * student @ turn).item() == pytest.approx(0, abs=1e-12)
    assert pkt(student, teacher).item() > 0.01


def test_opposite_images_by_hand() -> None:
    """Two images at a right angle to a third, and opposite to each other: 1, 1/2 and 0."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    expected = torch.tensor([[2 / 3, 0, 1 / 3], [0, 2 / 3, 1 / 3], [0.25, 0.25, 0.5]])
    torch.testing.assert_close(neighbours(x).exp(), expected, atol=1e-5, rtol=0)
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    value = pkt(x, teacher)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.isfinite()
    assert gradient.isfinite().all()
