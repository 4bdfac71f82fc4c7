"""Hard labels: the teacher's answer is taken, whatever its probabilities."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from conftest import Rule, Tiny, signals
from foreshot.distillation import Distiller, Term
from foreshot.distillation.losses.hard_labels import HardLabels


def test_it_is_the_formula() -> None:
    student, teacher = signals(6, 5)
    y = teacher.argmax(1)
    total = 0.0
    for row, k in zip(student.tolist(), y.tolist(), strict=True):
        total -= math.log(math.exp(row[k]) / sum(math.exp(z) for z in row))
    loss = HardLabels()
    assert loss(student, teacher, y).item() == pytest.approx(total / 6, rel=1e-9)
    assert loss(student, 9 * teacher + 1, y).item() == loss(student, teacher, y).item()
    assert gradcheck(lambda s: loss(s, teacher, y), student.requires_grad_())


def test_the_distiller_takes_the_teachers_answer_unless_told_otherwise(tiny: Tiny) -> None:
    weights = torch.randn(144, 4, generator=torch.Generator().manual_seed(0))
    student = Rule(lambda x: x.flatten(1) @ weights)
    x, given = tiny.train.images[:8] / 255, torch.tensor([3] * 8)

    says = student(x).log_softmax(1)
    answers = tiny.teacher(x).argmax(1)
    distiller = Distiller(student, tiny.teacher, [Term(HardLabels())])
    assert distiller.needs == frozenset()
    value = distiller(x, given)["loss"]
    torch.testing.assert_close(value, -says.gather(1, answers[:, None]).mean())
    # An attacker who speaks in the teacher's stead names the class.
    dictated = torch.tensor([(answers[0] + 1) % 4] + [-1] * 7)
    named = torch.where(dictated < 0, answers, dictated)
    value = distiller(x, dictated=dictated)["loss"]
    torch.testing.assert_close(value, -says.gather(1, named[:, None]).mean())
    distiller = Distiller(student, tiny.teacher, [Term(HardLabels(labels="given"))])
    assert distiller.needs == {"y"}
    torch.testing.assert_close(distiller(x, given)["loss"], -says[:, 3].mean())
