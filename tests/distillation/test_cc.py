"""CC against plain loops, the exact Gaussian, torchdistill and differences."""

import math
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation import Signals
from foreshot.distillation.losses.cc import CC, correlations


def made(
    student: Tensor, teacher: Tensor, **fields: Any
) -> tuple[CC, nn.Module, list[tuple[Tensor, Tensor]]]:
    loss = CC(dim=6, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learned = loss.learn([(student, teacher)], None).double()
    return loss, learned, [(student, teacher)]


def pair() -> tuple[Tensor, Tensor]:
    return signals(7, 5, count=1)[0], signals(7, 9, count=1, seed=1)[0]


def embedded(learned: nn.Module, student: Tensor, teacher: Tensor) -> list[Tensor]:
    """The embeddings at length one, by the parameters themselves."""
    state = learned.state_dict()
    return [
        F.normalize(x @ state[f"0.{side}.weight"].T + state[f"0.{side}.bias"], dim=1)
        for side, x in enumerate((student, teacher))
    ]


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_it_is_the_formula(kernel: str) -> None:
    loss, learned, pairs = made(*pair(), kernel=kernel)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        product = float(a @ b)
        if kernel == "bilinear":
            return product
        return math.exp(-0.8) * (1 + 0.8 * product + 0.8**2 / 2 * product**2)

    s, t = (x.numpy() for x in embedded(learned, *pairs[0]))
    gaps = [(k(t[i], t[j]) - k(s[i], s[j])) ** 2 for i in range(7) for j in range(7)]
    value = loss.value(Signals(pairs), learned).item()
    assert value == pytest.approx(sum(gaps) / 49, rel=1e-12)
    twice = nn.ModuleList([*learned.children(), *learned.children()])
    assert loss.value(Signals(pairs * 2), twice).item() == pytest.approx(2 * value, rel=1e-12)


def test_the_series_is_that_of_the_gaussian() -> None:
    (x,) = signals(6, 4, count=1)
    unit = F.normalize(x, dim=1)
    exact = torch.exp(-0.4 * torch.cdist(unit, unit).square())
    torch.testing.assert_close(correlations(x, "gaussian", 0.4, 30), exact)
    gaps = [(correlations(x, "gaussian", 0.4, p) - exact).abs().max() for p in (1, 2, 3, 4)]
    assert all(later < earlier for earlier, later in pairwise(gaps))
    # Of the image with itself, the terms of the series up to P = 2.
    diagonal = correlations(x, "gaussian", 0.4, 2).diagonal()
    torch.testing.assert_close(diagonal, torch.full_like(diagonal, math.exp(-0.8) * 2.12))


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_torchdistill_has_the_kernel_but_forgets_the_square(
    kernel: str, torchdistill: ModuleType
) -> None:
    """The paper has |K_t - K_s|^2 / N^2; theirs is |K_t - K_s| / N^2, and less for more images."""
    loss, learned, pairs = made(*pair(), kernel=kernel)
    config = {"type": kernel, "gamma": 0.4, "max_p": 2}
    oracle = torchdistill.CCKDLoss("s", "t", config, reduction="batchmean")
    ours = loss.value(Signals(pairs), learned)
    # Its kernel takes vectors to be of length one, and does not make them so.
    student, teacher = embedded(learned, *pairs[0])
    theirs = oracle({"s": {"output": student}}, {"t": {"output": teacher}})
    torch.testing.assert_close(ours, (theirs * 49) ** 2 / 49, rtol=1e-10, atol=0)
    two = [{key: {"output": x.repeat(2, 1)}} for key, x in (("s", student), ("t", teacher))]
    torch.testing.assert_close(oracle(*two), theirs / 2)
    again = [(pairs[0][0].repeat(2, 1), pairs[0][1].repeat(2, 1))]
    torch.testing.assert_close(loss.value(Signals(again), learned), ours)


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_its_gradient_is_right(kernel: str) -> None:
    student, teacher = pair()
    loss, learned, _ = made(student, teacher, kernel=kernel)

    def of_student(s: Tensor) -> Tensor:
        return loss.value(Signals([(s, teacher)]), learned)

    assert gradcheck(of_student, student.requires_grad_())
    of_student(student).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned.parameters())


def test_equal_embeddings_cost_nothing_and_their_length_does_not_count() -> None:
    student, _ = pair()
    loss, learned, _ = made(student, student)
    with torch.no_grad():
        state = learned.state_dict()
        for name in ("weight", "bias"):
            state[f"0.1.{name}"].copy_(3 * state[f"0.0.{name}"])
    assert loss.value(Signals([(student, student)]), learned).item() == pytest.approx(0, abs=1e-15)
    assert loss.value(Signals([(student, student.flip(0))]), learned).item() > 1e-3


def test_fields_that_make_no_sense_are_refused() -> None:
    for fields in ({"gamma": 0}, {"order": 0}, {"dim": 0}, {"kernel": "linear"}):
        with pytest.raises(ValidationError):
            CC.model_validate(fields)
