"""SimKD's loss against the formula in loops."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses import Signals
from foreshot.distillation.losses.simkd import SimKD, simkd
from foreshot.errors import ForeshotError


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 4, 2, 3)])
def test_it_is_the_mean_of_the_squared_differences(shape: tuple[int, ...]) -> None:
    student, teacher = signals(*shape)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = np.mean([(s - t) ** 2 for s, t in pairs])
    assert SimKD()(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert SimKD()(student, student).item() == 0
    both = SimKD().value(Signals([(student, teacher), (teacher, student)]), None)
    assert both.item() == pytest.approx(2 * expected, rel=1e-12)


def test_larger_maps_are_averaged_down() -> None:
    (large,), (small,) = signals(2, 3, 4, 6, count=1), signals(2, 3, 2, 3, count=1, seed=1)
    blocks = large.reshape(2, 3, 2, 2, 3, 2).mean((3, 5))
    expected = (blocks - small).square().mean()
    torch.testing.assert_close(simkd(large, small), expected)
    torch.testing.assert_close(simkd(small, large), expected)


def test_its_gradient_is_right() -> None:
    student, teacher = signals(2, 3, 4, 4)[0], signals(2, 3, 2, 2)[1]
    assert gradcheck(lambda s: simkd(s, teacher), student.requires_grad_())
    (gradient,) = torch.autograd.grad(simkd(teacher.requires_grad_(), student.detach()), teacher)
    blocks = student.detach().reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(gradient, 2 * (teacher - blocks) / 24)


def test_other_channels_are_refused() -> None:
    sentence = "^simkd: expected .* found 3 of the student and 5 of the teacher$"
    with pytest.raises(ForeshotError, match=sentence):
        SimKD()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
