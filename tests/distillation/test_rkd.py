"""RKD against plain loops, torchdistill, differences, and batches with equal images."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses.rkd import RKD, relations, rkd


def huber(a: float, b: float) -> float:
    gap = abs(a - b)
    return gap**2 / 2 if gap <= 1 else gap - 0.5


def by_hand(student: Tensor, teacher: Tensor, distance: float, angle: float) -> float:
    """Park et al., equations 4 to 8, pair by pair and triple by triple."""
    n = len(student)
    totals = [0.0, 0.0]
    spaces = [x.detach().numpy() for x in (student, teacher)]
    means = [
        sum(np.linalg.norm(x[i] - x[j]) for i in range(n) for j in range(n)) / (n * (n - 1))
        for x in spaces
    ]
    for j in range(n):
        for i in range(n):
            a, b = (
                float(np.linalg.norm(x[i] - x[j]) / mean)
                for x, mean in zip(spaces, means, strict=True)
            )
            totals[0] += huber(a, b)
            for k in range(n):
                cosines = []
                for x in spaces:
                    one, other = x[i] - x[j], x[k] - x[j]
                    size = float(np.linalg.norm(one) * np.linalg.norm(other))
                    cosines.append(float(one @ other) / size if size else 0.0)
                totals[1] += huber(*cosines)
    return distance * totals[0] / n**2 + angle * totals[1] / n**3


def theirs(mid_level: ModuleType, student: Tensor, teacher: Tensor) -> Tensor:
    loss = mid_level.RKDLoss("s", "t", dist_factor=25, angle_factor=50, reduction="mean")
    return loss({"s": {"output": student}}, {"t": {"output": teacher}})


def twins() -> tuple[Tensor, Tensor]:
    """A batch in which two images are equal to the student, and not to the teacher."""
    student, teacher = signals(6, 5)
    student[3] = student[1]
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_it_is_the_formula(scale: float) -> None:
    (student,), (teacher,) = signals(7, 5, count=1), signals(7, 9, count=1, seed=1)
    student[:2] *= scale  # far from the teacher's: both branches of Huber's loss
    expected = by_hand(student, teacher, 3, 0.7)
    assert rkd(student, teacher, 3, 0.7).item() == pytest.approx(expected, rel=1e-12)


def test_it_is_the_formula_with_equal_images() -> None:
    student, teacher = twins()
    assert RKD()(student, teacher).item() == pytest.approx(by_hand(student, teacher, 25, 50))


def test_it_is_torchdistills(torchdistill: ModuleType) -> None:
    (student,), (teacher,) = signals(16, 8, count=1), signals(16, 12, count=1, seed=1)
    torch.testing.assert_close(
        RKD()(student, teacher), theirs(torchdistill, student, teacher), rtol=1e-10, atol=0
    )
    single = RKD()(student.float(), teacher.float()).item()
    assert single == pytest.approx(RKD()(student, teacher).item(), rel=1e-6)


def test_its_gradient_is_right() -> None:
    student, teacher = signals(5, 4)
    assert gradcheck(lambda s: RKD()(s, teacher), student.requires_grad_())


def test_equal_images_do_not_make_the_gradient_explode(torchdistill: ModuleType) -> None:
    """The direction between two equal images is no direction; its derivative is not 1e12."""
    student, teacher = twins()
    (ours,) = torch.autograd.grad(RKD()(student, teacher), student)
    (other,) = torch.autograd.grad(theirs(torchdistill, student, teacher), student)
    assert ours.isfinite().all()
    assert ours.abs().max() < 100
    assert other.abs().max() > 1e9
    for x in (torch.ones(4, 3), torch.ones(1, 3)):
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(RKD()(x, torch.randn(len(x), 6)), x)
        assert gradient.isfinite().all()


def test_place_turn_and_scale_are_no_difference() -> None:
    student, teacher = signals(6, 5)
    turn = torch.linalg.qr(signals(5, 5, count=1, seed=2)[0]).Q
    assert RKD()(student, 3 * student @ turn - 7).item() == pytest.approx(0, abs=1e-12)
    assert RKD()(student, teacher).item() > 1


def test_a_triangle_by_hand() -> None:
    """Sides 3, 4, 5: their mean is 4, the right angle has cosine 0, the others 3/5 and 4/5."""
    distances, cosines = relations(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(
        distances, torch.tensor([[0, 0.75, 1], [0.75, 0, 1.25], [1, 1.25, 0]])
    )
    assert cosines[0, 1, 2].item() == pytest.approx(0)
    assert cosines[1, 0, 2].item() == pytest.approx(0.6)
    assert cosines[2, 0, 1].item() == pytest.approx(0.8)
    assert cosines[2, 1, 1].item() == pytest.approx(1)
    assert not cosines[0, 0].any()
    line = torch.tensor([[0.0], [1.0], [2.0]])  # distances 1, 1, 2 of mean 4/3
    distances, cosines = relations(line)
    assert distances[0, 2].item() == pytest.approx(1.5)
    assert cosines[1, 0, 2].item() == pytest.approx(math.cos(math.pi))
