"""The overhaul of feature distillation against the formula in loops."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses import Pair, Signals
from foreshot.distillation.losses.ofd import OFD, negative_mean, ofd


def by_hand(student: Tensor, teacher: Tensor, margin: Tensor) -> float:
    """The mean over the images of the sum of d(s, max(t, m)), of (N, C, P)."""
    total = 0.0
    for one, other in zip(student.tolist(), teacher.tolist(), strict=True):
        for channel, (row, goal) in enumerate(zip(one, other, strict=True)):
            for s, t in zip(row, goal, strict=True):
                t = max(t, margin[channel].item())
                total += 0 if s <= t <= 0 else (s - t) ** 2
    return total / len(student)


def features() -> Pair:
    (student,), (teacher,) = signals(4, 3, 2, 5, count=1), signals(4, 3, 2, 5, count=1, seed=1)
    return student, teacher


def learned(*pairs: Pair) -> nn.ModuleList:
    torch.manual_seed(0)
    return OFD().learn(pairs, None).double()


def test_it_is_the_formula() -> None:
    student, teacher = features()
    margin = torch.tensor([-0.4, 0, -1.5], dtype=torch.float64)
    expected = by_hand(student.flatten(2), teacher.flatten(2), margin)
    assert ofd(student, teacher, margin).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher", "cost"),
    [
        (3.0, 2.0, 1.0),  # both active
        (-1.0, 2.0, 9.0),  # to be active
        (1.0, -0.5, 2.25),  # to be not active, as far as the teacher is
        (1.0, -9.0, 9.0),  # as far as the margin
        (-1.5, -9.0, 0.25),  # not yet at the margin
        (-3.0, -9.0, 0.0),  # below the margin: far enough
        (-1.0, -0.5, 0.0),  # below the teacher: far enough
        (-0.2, -0.5, 0.09),  # above the teacher, though not active
        (-1.0, 0.0, 0.0),
    ],
)
def test_known_values_with_a_margin_of_minus_two(
    student: float, teacher: float, cost: float
) -> None:
    s, t = (torch.tensor(x).double().reshape(1, 1, 1, 1) for x in (student, teacher))
    assert ofd(s, t, torch.tensor([-2.0])).item() == pytest.approx(cost)


def test_the_margin_is_the_mean_negative_response_of_each_channel() -> None:
    _, teacher = features()
    teacher[:, 1] = teacher[:, 1].abs()
    expected = [
        np.mean([t for t in channel.flatten().tolist() if t < 0] or [0])
        for channel in teacher.unbind(1)
    ]
    assert negative_mean(teacher).tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[1] == 0 > expected[0]
    (connector,) = learned((signals(4, 2, 2, 5)[0], teacher))
    buffers = dict(connector.named_buffers())
    torch.testing.assert_close(buffers["margin"], negative_mean(teacher))
    assert "margin" in connector.state_dict()
    assert "margin" not in dict(connector.named_parameters())


def test_the_margin_of_a_normal_channel_is_that_of_the_authors() -> None:
    """They take E[x | x < 0] of a normal with the mean and deviation of the batch norm."""
    (noise,) = signals(4000, 2, 5, 5, count=1)
    mean, deviation = torch.tensor([0.5, -1]).double(), torch.tensor([1.0, 2]).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    z = -mean / deviation
    expected = mean - deviation * normal.log_prob(z).exp() / normal.cdf(z)
    said = negative_mean(noise * deviation[:, None, None] + mean[:, None, None])
    torch.testing.assert_close(said, expected, rtol=0.01, atol=0)


def test_the_student_is_connected_by_a_convolution_and_a_normalisation() -> None:
    student, teacher = signals(4, 2, 2, 5)[0], features()[1]
    parts = learned((student, teacher))
    (weight, scale, shift) = parts.parameters()
    assert weight.shape == (3, 2, 1, 1)
    with torch.no_grad():
        scale.copy_(torch.tensor([0.5, 2, 1]))
        shift.copy_(torch.tensor([-1.0, 0, 3]))
    connected = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0].detach(), student)
    connected -= connected.mean((0, 2, 3), keepdims=True)
    connected /= np.sqrt(connected.var((0, 2, 3), keepdims=True) + 1e-5)
    connected *= np.array([0.5, 2, 1])[:, None, None]
    connected += np.array([-1.0, 0, 3])[:, None, None]
    expected = by_hand(
        torch.from_numpy(connected).flatten(2), teacher.flatten(2), negative_mean(teacher)
    )
    value = OFD().value(Signals([(student, teacher)]), parts)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_each_pair_counts_half_as_much_as_the_next() -> None:
    pairs = [features(), features()[::-1], (signals(4, 5)[0], signals(4, 6)[1])]
    parts = learned(*pairs)
    alone = [
        OFD().value(Signals([pair]), nn.ModuleList([part]))
        for pair, part in zip(pairs, parts, strict=True)
    ]
    value = OFD().value(Signals(pairs), parts)
    torch.testing.assert_close(value, alone[0] / 4 + alone[1] / 2 + alone[2])


def test_larger_maps_are_averaged_down() -> None:
    (large,), (small,) = signals(3, 2, 4, 4, count=1), signals(3, 5, 2, 2, count=1)
    blocks = large.reshape(3, 2, 2, 2, 2, 2).mean((3, 5))
    for whole, part in (((large, small), (blocks, small)), ((small, large), (small, blocks))):
        values = [OFD().value(Signals([pair]), learned(pair)) for pair in (whole, part)]
        torch.testing.assert_close(values[0], values[1])


def test_its_gradient_is_right() -> None:
    student, teacher = features()
    margin = negative_mean(teacher)
    assert gradcheck(lambda s: ofd(s, teacher, margin), student.requires_grad_())
    parts = learned((student, teacher))
    assert gradcheck(lambda s: OFD().value(Signals([(s, teacher)]), parts), student)
