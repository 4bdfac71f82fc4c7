"""What a student is shown, and when its teacher is asked: by view policy and augmentation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import Tiny, stripes, trained
from foreshot.augment import Augmentation
from foreshot.compute import CPU
from foreshot.distillation import KD, Distiller, Term
from foreshot.inference import logits
from foreshot.lesson import Lesson, Views


def distiller(tiny: Tiny) -> Distiller:
    return Distiller(trained(tiny.train, 1), tiny.teacher, [Term(loss=KD())])


@pytest.mark.parametrize(
    ("views", "augment", "when"),
    [
        ("requery", "none", "before"),  # the plain image is the only view
        ("cached", "crop", "before"),
        ("cached", "strong", "before"),
        ("requery", "crop", "once a view"),  # there are so few that they come again
        ("requery", "strong", "each step"),
    ],
)
def test_when_the_teacher_is_asked(
    views: Views, augment: Augmentation, when: str, tiny: Tiny
) -> None:
    lesson = Lesson(tiny.train, tiny.teacher, augment, views)
    samples = lesson.samples(distiller(tiny), CPU)
    assert ("teacher_logits" in samples.targets) == (when == "before")
    assert (samples.teacher is tiny.teacher) == (when == "once a view")
    if when == "before":
        said = logits(tiny.teacher, tiny.train.images, CPU)
        torch.testing.assert_close(samples.targets["teacher_logits"], said)


def test_some_images_of_a_lesson_keep_what_is_theirs(tiny: Tiny) -> None:
    count, kept = len(tiny.train), torch.tensor([5, 2, 9])
    answers, places = torch.randn(count, 4), torch.arange(count)
    weights: Tensor = torch.rand(count)
    lesson = Lesson(tiny.train, tiny.teacher, "none", "cached", places % 3 - 1, answers, weights)
    samples = lesson.select(kept).samples(distiller(tiny), CPU)
    assert torch.equal(samples.images, tiny.train.images[kept])
    assert torch.equal(samples.targets["teacher_logits"], answers[kept])
    assert samples.targets["dictated"].tolist() == [1, 1, -1]
    assert samples.weights is not None
    assert torch.equal(samples.weights, weights[kept])

    more = stripes(3, 5)
    longer = replace(lesson.select(kept), weights=None).joined(more)
    samples = longer.samples(distiller(tiny), CPU)
    assert torch.equal(samples.images, torch.cat([tiny.train.images[kept], more.images]))
    said = logits(tiny.teacher, samples.images, CPU)  # no answer of before is for the new ones
    torch.testing.assert_close(samples.targets["teacher_logits"], said)
    assert samples.targets["dictated"].tolist() == [1, 1, -1, -1, -1, -1]
    assert longer.data.labels is not None
    assert more.labels is not None
    assert longer.data.labels.tolist()[3:] == more.labels.tolist()
    assert longer.data.joined(replace(more, labels=None)).labels is None
