"""Knowledge review against the formula in loops, and against torchdistill."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses import Pair, Signals
from foreshot.distillation.losses.review_kd import ReviewKD, hcl
from foreshot.errors import ForeshotError


def chain() -> list[Pair]:
    """Three stages, from shallow to deep."""
    shapes = [(3, 5, 8), (4, 6, 4), (6, 7, 2)]
    return [
        (signals(4, s, n, n, count=1, seed=s)[0], signals(4, t, n, n, count=1, seed=t)[0])
        for s, t, n in shapes
    ]


def learned(pairs: list[Pair], width: int = 512) -> Any:
    torch.manual_seed(0)
    return ReviewKD(width=width).learn(pairs, None).double()


def value(pairs: list[Pair], parts: nn.ModuleList) -> Tensor:
    return ReviewKD().value(Signals(pairs), parts)


def hcl_by_hand(student: Tensor, teacher: Tensor) -> float:
    """Of square maps whose side is a multiple of four."""
    s, t = student.numpy(), teacher.numpy()
    side, total, weights, weight = s.shape[2], np.mean((s - t) ** 2), 1.0, 1.0
    for level in (4, 2, 1):
        if level < side:
            n, weight = side // level, weight / 2
            errors = [
                (s - t)[..., y : y + n, x : x + n].mean((2, 3)) ** 2
                for y in range(0, side, n)
                for x in range(0, side, n)
            ]
            total, weights = total + weight * np.mean(errors), weights + weight
    return float(total / weights)


@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_the_hierarchical_context_loss_is_the_formula(side: int) -> None:
    student, teacher = signals(3, 4, side, side)
    expected = hcl_by_hand(student, teacher)
    assert hcl(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("side", [16, 7, 5, 4, 3, 2, 1])
def test_the_hierarchical_context_loss_is_that_of_torchdistill(
    side: int, torchdistill: ModuleType
) -> None:
    student, teacher = signals(3, 4, side, side)
    loss = torchdistill.HierarchicalContextLoss("layer", "output", "layer", "output")
    theirs = loss({"layer": {"output": (student, None)}}, {"layer": {"output": teacher}})
    assert hcl(student, teacher).item() == pytest.approx(theirs.item(), rel=1e-12)


def test_a_known_value() -> None:
    """A difference of 1 everywhere is 1 at every level; one that cancels is seen at full size."""
    zero = torch.zeros(1, 1, 8, 8)
    assert hcl(zero + 1, zero).item() == pytest.approx(1)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert hcl(board[None, None], zero).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4 + 1 / 8))
    column = torch.zeros(1, 1, 8, 1)  # tokens are averaged along their one axis
    assert hcl(column + 1, column).item() == pytest.approx(1)
    steps = torch.tensor([1.0, 1, -1, -1, 1, 1, -1, -1]).reshape(1, 1, 8, 1)
    assert hcl(steps, column).item() == pytest.approx((1 + 1 / 2) / (15 / 8))


def test_the_chain_is_the_formula() -> None:
    pairs = chain()
    parts = learned(pairs)

    def normalised(x: Tensor) -> Tensor:
        x = x - x.mean((0, 2, 3), keepdim=True)
        return x / (x.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()

    expected, deeper = 0.0, None
    for (student, teacher), part in reversed(list(zip(pairs, parts, strict=True))):
        kernels = {name: p.detach() for name, p in part.named_parameters()}
        out = torch.einsum("oc,nchw->nohw", kernels["enter.0.weight"][:, :, 0, 0], student)
        out = normalised(out)
        if deeper is not None:
            deeper = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
            both = torch.cat([out, deeper], 1)
            weight = kernels["attend.weight"][:, :, 0, 0]
            says = torch.einsum("oc,nchw->onhw", weight, both)
            ours, theirs = 1 / (1 + (-says - kernels["attend.bias"][:, None, None, None]).exp())
            out = ours[:, None] * out + theirs[:, None] * deeper
        deeper = out
        out = normalised(F.conv2d(out, kernels["leave.0.weight"], padding=1))
        expected += hcl_by_hand(out, teacher)
    assert value(pairs, parts).item() == pytest.approx(expected, rel=1e-9)


def test_deep_stages_help_shallow_ones_and_not_the_other_way() -> None:
    pairs = chain()
    parts = learned(pairs)
    students = [student.requires_grad_() for student, _ in pairs]
    outs, deeper = [], None
    for (student, teacher), part in reversed(list(zip(pairs, parts, strict=True))):
        out, deeper = part(student, deeper, teacher.shape[2:])
        outs.insert(0, out)
    for place, out in enumerate(outs):
        gradients = torch.autograd.grad(
            out.square().sum(), students, allow_unused=True, retain_graph=True
        )
        assert [g is not None for g in gradients] == [other >= place for other in range(3)]


def test_maps_of_another_size_take_the_nearest_pixel() -> None:
    pairs = chain()
    parts = learned(pairs)
    deep = pairs[-1]
    larger = F.interpolate(deep[1], (6, 6), mode="bilinear")
    out, fused = parts[-1](deep[0], None, larger.shape[2:])
    assert out.shape == larger.shape
    small = parts[-1].enter(deep[0])
    torch.testing.assert_close(fused, small.repeat_interleave(3, 2).repeat_interleave(3, 3))
    assert value([*pairs[:2], (deep[0], larger)], parts).isfinite()
    pooled = [(s.mean((2, 3)), t.mean((2, 3))) for s, t in pairs[-1:]]
    assert value([*pairs, *pooled], learned([*pairs, *pooled])).isfinite()


def test_the_width_is_the_deepest_stages_or_less() -> None:
    pairs = chain()
    assert [part.enter[0].weight.shape[:2] for part in learned(pairs)] == [(6, 3), (6, 4), (6, 6)]
    assert {part.enter[0].out_channels for part in learned(pairs, width=4)} == {4}
    assert [part.leave[0].weight.shape[:2] for part in learned(pairs)] == [(5, 6), (6, 6), (7, 6)]


def test_its_gradient_is_right() -> None:
    (shallow, first), (deep, second) = (
        (s[:2, :, :n, :n], t[:2, :, :n, :n]) for n, (s, t) in zip((2, 1), chain()[1:], strict=True)
    )
    parts = learned([(shallow, first), (deep, second)])
    inputs = (shallow.requires_grad_(), deep.requires_grad_())
    assert gradcheck(lambda a, b: value([(a, first), (b, second)], parts), inputs)


def test_stages_from_deep_to_shallow_are_refused() -> None:
    with pytest.raises(ForeshotError, match=r"^review_kd: .* 2 x 2, then 4 x 4, then 8 x 8$"):
        learned(chain()[::-1])
