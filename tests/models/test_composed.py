"""Architectures that are made of others: an ensemble, and a body under its teacher's classifier."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import ARCHITECTURE, Tiny, seen
from foreshot.attacks.surrogate import surrogate
from foreshot.compute import CPU
from foreshot.distillation import Distiller, Term
from foreshot.distillation.losses.simkd import SimKD
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.models import (
    Ensemble,
    EnsembleNetwork,
    ResNet,
    ReusedHead,
    UnanimousNetwork,
    Vit,
    build,
)
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import load_model, save_model
from foreshot.training import Samples, Supervised, Training, fit


def test_an_ensemble_answers_with_the_mean_of_the_probabilities(tiny: Tiny) -> None:
    model = build(Ensemble(of=ARCHITECTURE, count=3), tiny.train.images, 4, 0, "teacher").eval()
    x = tiny.test.images[:8] / 255
    alone = [Normalized(m, model.mean, model.std)(x) for m in model.network.children()]
    assert len(alone) == 3
    assert not torch.allclose(alone[0], alone[1])
    mean = torch.stack([F.softmax(said, 1) for said in alone]).mean(0)
    torch.testing.assert_close(F.softmax(model(x), 1), mean)
    same = EnsembleNetwork([tiny.teacher, tiny.teacher])
    torch.testing.assert_close(same(x).softmax(1), tiny.teacher(x).softmax(1))


def test_the_unanimous_are_as_sure_as_all_of_them_together(tiny: Tiny) -> None:
    """By the product of their probabilities: one of them that objects outweighs one that agrees."""
    other = build(ARCHITECTURE, tiny.train.images, 4, 1, "teacher").eval()
    x = tiny.test.images[:8] / 255
    members = [tiny.teacher(x).softmax(1), other(x).softmax(1)]
    wanted = (members[0] * members[1]).sqrt()
    both = UnanimousNetwork([tiny.teacher, other])(x)
    torch.testing.assert_close(both.softmax(1), wanted / wanted.sum(1, keepdim=True))
    assert not torch.allclose(both.softmax(1), EnsembleNetwork([tiny.teacher, other])(x).softmax(1))


def test_the_members_of_an_ensemble_learn_apart(tiny: Tiny) -> None:
    """Each ends as it would without the others."""
    architecture = Ensemble(of=ARCHITECTURE, count=2)
    model, twin = (build(architecture, tiny.train.images, 4, 0, "teacher") for _ in range(2))
    assert tiny.train.labels is not None
    samples = Samples(tiny.train.images, {"y": tiny.train.labels})
    schedule = Training(epochs=1, batch=40, lr=0.1)
    for number, part in enumerate(architecture.parts(model)):
        fit(Supervised(part), samples, schedule, CPU, seed=0, stage=f"teacher {number}")
    second = architecture.parts(twin)[1]
    fit(Supervised(second), samples, schedule, CPU, seed=0, stage="teacher 1")
    weights = model.network.get_submodule("member1").state_dict()
    for name, tensor in second.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert not torch.equal(
        weights["fc.weight"], model.network.get_submodule("member0").state_dict()["fc.weight"]
    )


def test_a_reused_head_learns_its_teachers_last_feature(tiny: Tiny, tmp_path: Path) -> None:
    architecture = ReusedHead(body=ResNet(depth=8, width=1, stem_stride=2), head=ARCHITECTURE)
    student = build(architecture, tiny.train.images, 4, 0, "student")
    architecture.adopt(student, tiny.teacher)
    term = Term(SimKD(), 10, at=[("network.projector", "network.layer3")])
    distiller = Distiller(student, tiny.teacher, [term], example=tiny.train.images[:4] / 255)
    samples, schedule = Samples(tiny.train.images), Training(epochs=6, batch=40, lr=0.1)
    fit(distiller, samples, schedule, CPU, seed=0, stage="student")
    for key in ("network.fc.weight", "network.fc.bias"):
        assert torch.equal(student.state_dict()[key], tiny.teacher.state_dict()[key])
    said = logits(student, tiny.test.images, CPU)
    assert (said.argmax(1) == tiny.test.labels).float().mean() > 0.9
    save_model(tmp_path / "m", student, architecture, tiny.train.shape, tiny.train.classes)
    loaded = load_model(tmp_path / "m")
    assert loaded.architecture == architecture
    torch.testing.assert_close(logits(loaded.model, tiny.test.images, CPU), said)


def test_a_head_cannot_be_reused_on_tokens(tiny: Tiny) -> None:
    body = Vit(dim=16, depth=3, heads=2)
    with pytest.raises(ForeshotError, match="^model reused_head: expected a body of maps"):
        build(ReusedHead(body=body), tiny.train.images, 4, 0, "student")


def test_a_surrogate_reuses_its_teachers_head(tiny: Tiny) -> None:
    architecture = ReusedHead(body=ARCHITECTURE, head=ARCHITECTURE)
    student = surrogate(seen(tiny), architecture, Training(epochs=1, batch=100))
    for key in ("network.fc.weight", "network.fc.bias"):
        assert torch.equal(student.state_dict()[key], tiny.teacher.state_dict()[key])


def test_only_the_head_of_the_very_teacher_is_reused(tiny: Tiny) -> None:
    images = tiny.train.images
    student = build(ReusedHead(body=ARCHITECTURE, head=ARCHITECTURE), images, 4, 0, "student")
    wider, several = ResNet(depth=8, width=2), Ensemble(of=ARCHITECTURE, count=2)
    for other, found in ((wider, "found fc Linear"), (several, "found EnsembleNetwork")):
        teacher = build(other, images, 4, 0, "teacher")
        with pytest.raises(ForeshotError, match=f"a teacher of the architecture head.*{found}"):
            ReusedHead(body=ARCHITECTURE, head=ARCHITECTURE).adopt(student, teacher)
