"""Attention transfer against the formula in loops, and against torchdistill."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation.losses import Signals
from foreshot.distillation.losses.at import AT, at
from foreshot.errors import ForeshotError


def map_by_hand(feature: Tensor, power: float) -> np.ndarray:
    """(N, H W), each row of length 1."""
    rows = []
    for image in feature.numpy():
        row = [
            sum(abs(channel[y, x]) ** power for channel in image) / len(image)
            for y in range(image.shape[1])
            for x in range(image.shape[2])
        ]
        rows.append(np.array(row) / np.sqrt(sum(value**2 for value in row)))
    return np.array(rows)


def of_torchdistill(module: ModuleType, mode: str, student: Tensor, teacher: Tensor) -> float:
    path: dict[str, Any] = {"io": "output", "path": "layer"}
    loss = module.ATLoss({"pair": {"teacher": path, "student": path}}, mode=mode)
    return loss({"layer": {"output": student}}, {"layer": {"output": teacher}}).item()


def features() -> tuple[Tensor, Tensor]:
    (student,), (teacher,) = signals(3, 4, 3, 5, count=1), signals(3, 6, 3, 5, count=1, seed=1)
    return student, teacher


@pytest.mark.parametrize("power", [1, 2, 2.5, 3])
def test_it_is_the_formula(power: float) -> None:
    student, teacher = features()
    difference = map_by_hand(student, power) - map_by_hand(teacher, power)
    expected = float(np.mean(difference**2))
    assert at(student, teacher, power).item() == pytest.approx(expected, rel=1e-12)
    assert AT(power=power)(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_it_is_the_authors_code_as_torchdistill_has_it(torchdistill: ModuleType) -> None:
    student, teacher = features()
    code = of_torchdistill(torchdistill, "code", student, teacher)
    assert AT()(student, teacher).item() == pytest.approx(code, rel=1e-12)


def test_the_papers_norm_is_the_root_of_ours_for_one_image(torchdistill: ModuleType) -> None:
    for student, teacher in zip(*(x.split(1) for x in features()), strict=True):
        paper = of_torchdistill(torchdistill, "paper", student, teacher)
        assert (AT()(student, teacher) * 15).sqrt().item() == pytest.approx(paper, rel=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_its_gradient_is_right(power: float) -> None:
    student, teacher = features()
    assert gradcheck(lambda s: at(s, teacher, power), student.requires_grad_())


def test_only_where_it_looks_matters() -> None:
    student, teacher = features()
    value = AT()(student, teacher)
    torch.testing.assert_close(AT()(-3 * student, teacher / 7), value)
    torch.testing.assert_close(AT()(student.flip(1), teacher.repeat(1, 2, 1, 1)), value)
    assert AT()(student, -2 * student).item() == pytest.approx(0, abs=1e-20)
    assert AT()(student, student.flip(2)) > 1e-3


def test_a_known_value() -> None:
    """One looks at one place of four, the other at all of them alike."""
    student = torch.tensor([5.0, 0, 0, 0]).reshape(1, 1, 2, 2)
    teacher = torch.ones(1, 3, 2, 2)
    # (1 - 1/2)^2 and three times (1/2)^2, over four places
    assert AT()(student, teacher).item() == pytest.approx(0.25)


def test_larger_maps_are_averaged_down_and_tokens_are_maps() -> None:
    student, teacher = signals(2, 3, 4, 4)
    blocks = teacher.reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    small = student[:, :, :2, :2]
    torch.testing.assert_close(AT()(small, teacher), AT()(small, blocks))
    torch.testing.assert_close(AT()(teacher, small), AT()(blocks, small))
    tokens = (x.flatten(2).transpose(1, 2) for x in (student, teacher))
    torch.testing.assert_close(AT()(*tokens), AT()(student, teacher))


def test_pairs_are_summed() -> None:
    pairs = [features(), (signals(3, 2, 2, 2)[0], signals(3, 5, 4, 4)[1])]
    expected = AT()(*pairs[0]) + AT()(*pairs[1])
    torch.testing.assert_close(AT().value(Signals(pairs), None), expected)


def test_a_dead_map_has_a_gradient_without_nan() -> None:
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(AT()(student, torch.rand(2, 3, 2, 2)), student)
    assert torch.isfinite(gradient).all()


def test_one_position_is_refused() -> None:
    (vector,) = signals(2, 3, count=1)
    with pytest.raises(ForeshotError, match=r"^at: expected .* one position, found \(2, 3\) of"):
        AT()(vector, vector)
    with pytest.raises(ForeshotError, match="one position"):
        AT()(vector[:, :, None, None], signals(2, 3, 4, 4)[0])
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        AT(power=0.5)
