"""Variational information distillation against the formula in loops, and against torchdistill."""

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses import Pair, Signals
from foreshot.distillation.losses.vid import VID, vid


def features() -> Pair:
    return signals(3, 2, 4, 5, count=1)[0], signals(3, 6, 4, 5, count=1, seed=1)[0]


def learned(*pairs: Pair, variance: float = 5.0) -> nn.ModuleList:
    torch.manual_seed(0)
    return VID(variance=variance).learn(pairs, None).double()


def test_it_is_the_formula() -> None:
    student, teacher = features()
    parts = learned((student, teacher))
    raw, *weights = parts.parameters()
    raw.data = torch.linspace(-3, 25, 6).double()
    mean = student.numpy()
    for place, weight in enumerate(weights):
        mean = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0].detach(), mean)
        mean = np.maximum(mean, 0) if place < 2 else mean
    terms = []
    for channel in range(6):
        variance = math.log1p(math.exp(raw[channel].item())) + 1e-5
        errors = (teacher.numpy()[:, channel] - mean[:, channel]).flatten().tolist()
        terms += [(error**2 / variance + math.log(variance)) / 2 for error in errors]
    value = VID().value(Signals([(student, teacher)]), parts)
    assert value.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_it_is_a_gaussians_likelihood() -> None:
    mean, teacher = signals(3, 4, 2, 2)
    variance = torch.tensor([0.1, 1, 2, 30], dtype=torch.float64)
    normal = torch.distributions.Normal(mean, variance.sqrt()[:, None, None])
    constant = math.log(2 * math.pi) / 2
    expected = -normal.log_prob(teacher).mean() - constant
    torch.testing.assert_close(vid(mean, variance, teacher), expected)


def test_it_is_the_authors_code_as_torchdistill_has_it(torchdistill: ModuleType) -> None:
    mean, teacher = signals(3, 4, 2, 2)
    variance = torch.tensor([0.1, 1, 2, 30], dtype=torch.float64)
    path: dict[str, Any] = {"io": "output", "path": "layer"}
    loss = torchdistill.VIDLoss({"pair": {"teacher": path, "student": path}})
    said = mean, variance[:, None, None]
    expected = loss({"layer": {"output": said}}, {"layer": {"output": teacher}})
    assert vid(mean, variance, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("variance", [1e-3, 0.5, 5, 1e4])
def test_the_variance_starts_as_told(variance: float) -> None:
    student, teacher = features()
    (regressor,) = learned((student, teacher), variance=variance)
    _, said = regressor(student)
    # raw is drawn up in single precision
    torch.testing.assert_close(said, torch.full_like(said, variance), rtol=1e-5, atol=0)


def test_the_best_variance_is_the_mean_squared_error_of_the_channel() -> None:
    mean, teacher = signals(3, 4, 2, 2)
    best = (teacher - mean).square().mean((0, 2, 3)).requires_grad_()
    value = vid(mean, best, teacher)
    (gradient,) = torch.autograd.grad(value, best)
    assert gradient.abs().max().item() < 1e-15
    for factor in (0.9, 1.1):
        assert vid(mean, best * factor, teacher) > value


def test_its_gradient_is_right() -> None:
    student, teacher = features()
    parts = learned((student, teacher))
    teacher, loss = teacher[:, :, :2, :2], VID()
    student = student[:, :, :2, :2].requires_grad_()
    inputs = (student, *parts.parameters())
    assert gradcheck(lambda s, *_: loss.value(Signals([(s, teacher)]), parts), inputs)


def test_larger_maps_are_averaged_down_and_pairs_summed() -> None:
    (large,), (small,) = signals(3, 2, 4, 4, count=1), signals(3, 5, 2, 2, count=1)
    blocks = large.reshape(3, 2, 2, 2, 2, 2).mean((3, 5))
    pairs, parts = [(large, small), (small, large)], learned((large, small), (small, large))
    averaged: list[tuple[Tensor, Tensor]] = [(blocks, small), (small, blocks)]
    value = VID().value(Signals(pairs), parts)
    alone = [
        VID().value(Signals([pair]), nn.ModuleList([part]))
        for pair, part in zip(averaged, parts, strict=True)
    ]
    torch.testing.assert_close(value, alone[0] + alone[1])


def test_a_variance_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal"):
        VID(variance=1e-6)
