"""FitNet's hints against the formula in loops."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses import Pair, Signals
from foreshot.distillation.losses.fitnet import FitNet, fitnet
from foreshot.errors import ForeshotError


def by_hand(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor) -> float:
    """The mean of (W s + b - t)^2, of (N, C, P) features at P positions."""
    s, t, w, b = (x.detach().numpy() for x in (student, teacher, weight, bias))
    errors = [
        (sum(w[o, c] * s[n, c, p] for c in range(s.shape[1])) + b[o] - t[n, o, p]) ** 2
        for n in range(t.shape[0])
        for o in range(t.shape[1])
        for p in range(t.shape[2])
    ]
    return float(np.mean(errors))


def learned(*pairs: Pair) -> Any:
    torch.manual_seed(0)
    return FitNet().learn(pairs, None).double()


def test_maps_tokens_and_vectors_are_regressed_by_the_formula() -> None:
    for size in ((4, 3), (5,), ()):
        (student,), (teacher,) = signals(2, 3, *size, count=1), signals(2, 6, *size, count=1)
        pair = (student, teacher)
        if len(size) == 1:  # tokens have their channels last
            pair = (student.transpose(1, 2), teacher.transpose(1, 2))
        parts = learned(pair)
        weight, bias = parts.parameters()
        assert weight.shape == (6, 3, 1, 1)
        expected = by_hand(
            student.reshape(2, 3, -1), teacher.reshape(2, 6, -1), weight[:, :, 0, 0], bias
        )
        value = FitNet().value(Signals([pair]), parts)
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_larger_maps_are_averaged_down() -> None:
    (student,), (teacher,) = signals(2, 3, 4, 4, count=1), signals(2, 5, 2, 2, count=1)
    (regressor,) = learned((student, teacher))
    blocks = student.reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(
        fitnet(student, teacher, regressor), fitnet(blocks, teacher, regressor)
    )
    # It is linear, so that the order of averaging and regressing does not matter.
    after = regressor(student).reshape(2, 5, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(
        fitnet(student, teacher, regressor), (after - teacher).square().mean()
    )
    small, large = student[:, :, :2, :2], teacher.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(fitnet(small, large, regressor), fitnet(small, teacher, regressor))


def test_pairs_are_summed_and_each_has_its_own_regressor() -> None:
    one = signals(2, 3, 2, 2)
    other = signals(2, 4, 1, 1)[0], signals(2, 7, 1, 1)[1]
    pairs = [(one[0], one[1]), other]
    parts = learned(*pairs)
    both = FitNet().value(Signals(pairs), parts)
    alone = [fitnet(*pair, part) for pair, part in zip(pairs, parts, strict=True)]
    torch.testing.assert_close(both, alone[0] + alone[1])


def test_a_teacher_that_is_a_mix_of_the_students_channels_costs_nothing() -> None:
    (student,) = signals(4, 3, 2, 2, count=1)
    mix, shift = torch.tensor([[1.0, -2, 0], [0, 3, 1]]).double(), torch.tensor([0.5, -4]).double()
    teacher = torch.einsum("oc,nchw->nohw", mix, student) + shift[:, None, None]
    (regressor,) = learned((student, teacher))
    with torch.no_grad():
        regressor.weight.copy_(mix[:, :, None, None])
        regressor.bias.copy_(shift)
    assert (teacher < 0).any()  # which a regressor with a ReLU could not reach
    assert fitnet(student, teacher, regressor).item() == pytest.approx(0, abs=1e-20)


def test_its_gradient_is_right() -> None:
    (student,), (teacher,) = signals(2, 3, 3, 3, count=1), signals(2, 4, 2, 2, count=1)
    (regressor,) = learned((student, teacher))
    inputs = (student.requires_grad_(), regressor.weight)
    assert gradcheck(lambda s, _: fitnet(s, teacher, regressor), inputs)


def test_a_feature_without_channels_is_refused() -> None:
    (flat,) = signals(4, count=1)
    with pytest.raises(ForeshotError, match="expected features"):
        learned((flat, flat))
