"""What a teacher said is what it would say: view by view, interrupted or not, kept or not."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foreshot.recall
from conftest import ARCHITECTURE, Tiny
from foreshot.augment import Augmentation, augment, number_of_views
from foreshot.compute import CPU, Compute
from foreshot.distillation import KD, Distiller, Term
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.models import build
from foreshot.models.checkpoint import state_digest
from foreshot.progress import Event
from foreshot.recall import Recall
from foreshot.training import Samples, Training, fit

SCHEDULE = Training(epochs=3, batch=16, lr=0.05, augment="crop_flip")


class Counting(nn.Module):
    """A teacher that notes which images it is asked about."""

    def __init__(self, tiny: Tiny) -> None:
        super().__init__()
        self.inner = tiny.teacher
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked += list(x.clone())
        return self.inner(x)


def distilled(tiny: Tiny, recalled: bool, file: Path | None = None, stop: int = 0) -> str:
    """The digest of a student of a few images, distilled with the answers recalled or live."""
    images = tiny.train.images[:70]
    student = build(ARCHITECTURE, images, 4, 3, "student")
    distiller = Distiller(student, tiny.teacher, [Term(KD())])
    samples = Samples(images, teacher=tiny.teacher if recalled else None)

    def listen(event: Event) -> None:
        if event.kind == "epoch" and event.done == 70 * stop:
            raise KeyboardInterrupt

    fit(distiller, samples, SCHEDULE, CPU, seed=4, stage="x", checkpoint=file, listener=listen)
    return state_digest(student)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["none", "crop", "crop_flip"])
def test_every_view_has_the_answer_that_the_teacher_gives_it(
    kind: Augmentation, kept: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(foreshot.recall, "LARGEST", 0)
    images = tiny.train.images[:5]
    shape = images.shape[1], images.shape[2], images.shape[3]
    count, index = number_of_views(kind, shape), torch.tensor([4, 0, 3, 1, 2])
    assert count is not None
    recall = Recall(tiny.teacher, images, kind, CPU)
    for view in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist() * 2:
        views = torch.full((5,), view)
        recall.prepare(index, views)
        seen = augment(images[index], kind, torch.Generator(), views)
        live = logits(tiny.teacher, seen, CPU)
        torch.testing.assert_close(recall(index, views), live, rtol=1e-5, atol=1e-5)


def test_no_view_is_asked_about_twice(tiny: Tiny) -> None:
    teacher, images = Counting(tiny), tiny.train.images[:300]
    recall = Recall(teacher, images, "crop", CPU)
    teacher.asked.clear()
    random = torch.Generator().manual_seed(1)
    known: set[tuple[int, int]] = set()
    for _ in range(6):
        index = torch.randperm(300, generator=random)[:200]
        views = torch.randint(0, 3, (200,), generator=random)
        new = set(zip(index.tolist(), views.tolist(), strict=True)) - known
        recall.prepare(index, views)
        # Chunks are filled up; what stands in them more than once is what fills them.
        assert len(Counter(x.numpy().tobytes() for x in teacher.asked)) <= len(new)
        assert len(teacher.asked) == -(-len(new) // 128) * 128
        teacher.asked.clear()
        known |= new


def test_recalled_and_live_answers_make_the_same_student(tiny: Tiny) -> None:
    images = tiny.train.images[:70]
    said: list[Tensor] = []
    for teacher in (tiny.teacher, None):
        student = build(ARCHITECTURE, images, 4, 3, "student")
        distiller = Distiller(student, tiny.teacher, [Term(KD())])
        fit(distiller, Samples(images, teacher=teacher), SCHEDULE, CPU, seed=4, stage="x")
        said.append(logits(student, tiny.test.images, CPU))
    torch.testing.assert_close(*said, rtol=1e-2, atol=1e-3)


def test_an_interrupted_training_recalls_the_same(tiny: Tiny, tmp_path: Path) -> None:
    undisturbed, file = distilled(tiny, recalled=True), tmp_path / "checkpoint.safetensors"
    for stop in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            distilled(tiny, True, file, stop)
    assert distilled(tiny, True, file) == undisturbed


def test_a_set_that_the_device_does_not_hold_is_brought_batch_by_batch(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [distilled(tiny, recalled) for recalled in (True, False)]
    monkeypatch.setattr(Compute, "holds", lambda *_: False)
    assert [distilled(tiny, recalled) for recalled in (True, False)] == whole


def test_views_that_are_not_counted_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="^augment strong: no view comes up again"):
        Recall(tiny.teacher, tiny.train.images, "strong", CPU)
