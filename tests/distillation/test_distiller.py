"""The distiller adds what it is told to add, and never touches the teacher."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import Rule, Tiny
from foreshot.compute import CPU
from foreshot.distillation import KD, Distiller, Loss, Pair, PairLoss, Signals, Term, kd
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.models import ResNet, build
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import state_digest
from foreshot.seeding import generator
from foreshot.training import Samples, Training, fit


class Squared(PairLoss):
    """Mean squared difference of two features, for tests alone."""

    name: Literal["squared"] = "squared"
    on_features: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean()


def on_features(*at: tuple[str, str], weight: float = 1.0) -> Term:
    return Term(Squared(), weight, at=at)


@pytest.fixture
def student(tiny: Tiny) -> Normalized:
    architecture = ResNet(depth=8, width=0.5, stem_stride=2)
    return build(architecture, tiny.train.images, 4, 1, "student")


@pytest.fixture
def x(tiny: Tiny) -> Tensor:
    return tiny.train.images[:16] / 255


def test_the_loss_is_the_weighted_sum_of_its_terms(
    tiny: Tiny, student: Normalized, x: Tensor
) -> None:
    terms = (Term(loss=KD(temperature=2), weight=0.3), Term(loss=KD(temperature=7), weight=2))
    y = torch.arange(16) % 4
    outputs = Distiller(student, tiny.teacher, terms, ce_weight=0.5)(x, y)
    says, teacher_says = outputs["student_logits"], outputs["teacher_logits"]
    assert torch.equal(teacher_says, tiny.teacher(x))
    first, second = kd(says, teacher_says, 2), kd(says, teacher_says, 7)
    torch.testing.assert_close(outputs["0_kd"], first)
    torch.testing.assert_close(outputs["1_kd"], second)
    torch.testing.assert_close(outputs["ce"], F.cross_entropy(says, y))
    expected = 0.3 * first + 2 * second + 0.5 * F.cross_entropy(says, y)
    torch.testing.assert_close(outputs["loss"], expected)


def test_a_term_takes_no_more_than_it_has() -> None:
    with pytest.raises(ValueError, match="zip"):
        Term(KD(), 1.0, (), "more")


def test_without_labels_the_cross_entropy_is_left_out_and_nothing_rescaled(
    tiny: Tiny, student: Normalized, x: Tensor
) -> None:
    student.eval()
    y = torch.arange(16) % 4
    term = Term(loss=KD(temperature=3), weight=0.7)
    with_labels = Distiller(student.eval(), tiny.teacher, [term], ce_weight=0.9)
    with_labels.eval()
    blind, sighted = with_labels(x), with_labels(x, y)
    assert "ce" not in blind
    torch.testing.assert_close(blind["loss"], 0.7 * blind["0_kd"])
    torch.testing.assert_close(sighted["loss"] - blind["loss"], 0.9 * sighted["ce"])
    off = Distiller(student, tiny.teacher, [term], ce_weight=0)
    assert torch.equal(off.eval()(x, y)["loss"], blind["loss"])
    assert "ce" not in off(x, y)


def test_known_answers_give_the_same_loss_and_gradient(
    tiny: Tiny, student: Normalized, x: Tensor
) -> None:
    distiller = Distiller(student, tiny.teacher, [Term(loss=KD())]).eval()
    calls: list[int] = []
    handle = tiny.teacher.register_forward_hook(lambda *_: calls.append(1))
    live = distiller(x)
    assert calls == [1]
    known = distiller(x, teacher_logits=live["teacher_logits"])
    handle.remove()
    assert calls == [1]
    assert torch.equal(live["loss"], known["loss"])
    gradients = [
        torch.autograd.grad(outputs["loss"], list(student.parameters()))
        for outputs in (live, known)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_cached_view_of_a_set_gives_the_same_student(tiny: Tiny) -> None:
    """Without augmentation, asking the teacher once and at each step is the same."""
    images, digests = tiny.train.images[:96], []
    for cached in (True, False):
        student = build(ResNet(depth=8, width=0.5, stem_stride=2), images, 4, 1, "student")
        answers = logits(tiny.teacher, images, CPU, batch=32)
        targets = {"teacher_logits": answers} if cached else {}
        distiller = Distiller(student, tiny.teacher, [Term(loss=KD())])
        fit(distiller, Samples(images, targets), Training(epochs=1, batch=32), CPU, seed=0,
            stage="student")  # fmt: skip
        digests.append(torch.cat([p.flatten() for p in student.parameters()]))
    torch.testing.assert_close(digests[0], digests[1], rtol=1e-3, atol=1e-5)


def test_the_teacher_is_frozen_silent_and_unchanged(tiny: Tiny, student: Normalized) -> None:
    before, running = state_digest(tiny.teacher), state_digest(student)
    distiller = Distiller(student, tiny.teacher, [Term(loss=KD())])
    assert not tiny.teacher.training
    assert set(distiller.state_dict()) == {f"student.{k}" for k in student.state_dict()}
    assert len(list(distiller.parameters())) == len(list(student.parameters()))
    assert distiller.train().student.training
    assert not tiny.teacher.training
    samples = Samples(tiny.train.images[:64])
    fit(distiller, samples, Training(epochs=1, batch=16), CPU, seed=0, stage="student")
    assert state_digest(tiny.teacher) == before
    assert state_digest(student) != running
    assert all(p.grad is None and not p.requires_grad for p in tiny.teacher.parameters())
    assert all(not m.training for m in tiny.teacher.modules())
    tiny.teacher.train()  # somebody else's mistake
    distiller(tiny.train.images[:4] / 255)
    assert state_digest(tiny.teacher) == before
    assert not tiny.teacher.training


def test_a_student_learns_from_answers_alone(tiny: Tiny, student: Normalized) -> None:
    distiller = Distiller(student, tiny.teacher, [Term(loss=KD())])
    schedule = Training(epochs=8, batch=40, lr=0.1)
    fit(distiller, Samples(tiny.train.images), schedule, CPU, seed=0, stage="student")
    assert tiny.test.labels is not None
    said = logits(student, tiny.test.images, CPU).argmax(1)
    assert (said == tiny.test.labels).float().mean() > 0.95


def test_the_teacher_moves_with_the_distiller(tiny: Tiny, student: Normalized) -> None:
    teacher = deepcopy(tiny.teacher)
    Distiller(student, teacher, [Term(loss=KD())]).double()
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}


def test_features_of_named_layers_are_compared(tiny: Tiny, student: Normalized, x: Tensor) -> None:
    layers = ("network.layer1", "network.layer3")
    term = on_features(*((name, name) for name in layers), weight=0.5)
    distiller = Distiller(student, tiny.teacher, [term]).eval()
    caught: dict[tuple[str, str], Tensor] = {}

    def catch(*key: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            caught[key[0], key[1]] = output

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(catch(role, name))
        for role, model in (("student", student), ("teacher", tiny.teacher))
        for name in layers
    ]
    outputs = distiller(x)
    for handle in handles:
        handle.remove()
    expected = sum(
        (caught["student", name] - caught["teacher", name]).square().mean() for name in layers
    )
    torch.testing.assert_close(outputs["0_squared"], expected)
    torch.testing.assert_close(outputs["loss"], 0.5 * expected)
    # The teacher is asked for its features even though its answers are known.
    torch.testing.assert_close(
        distiller(x, teacher_logits=outputs["teacher_logits"] * 2)["loss"], outputs["loss"]
    )
    outputs["loss"].backward()
    assert student.network.get_submodule("layer1")[0].conv1.weight.grad is not None  # type: ignore[index,union-attr]
    assert student.network.get_submodule("fc").weight.grad is None


def test_kd_between_classifiers_is_kd_of_the_logits(
    tiny: Tiny, student: Normalized, x: Tensor
) -> None:
    student.eval()
    named = Term(loss=KD(), at=(("network.fc", "network.fc"),))
    on_logits = Distiller(student, tiny.teacher, [Term(loss=KD())])(x)["loss"]
    torch.testing.assert_close(Distiller(student, tiny.teacher, [named])(x)["loss"], on_logits)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_unknown_layer_is_a_sentence_that_names_the_known(
    role: str, tiny: Tiny, student: Normalized
) -> None:
    pair = ("layerX", "network.fc") if role == "student" else ("network.fc", "layerX")
    with pytest.raises(ForeshotError) as caught:
        Distiller(student, tiny.teacher, [on_features(pair)])
    sentence = str(caught.value)
    assert sentence.startswith(f"{role} layer 'layerX': expected one of network, ")
    assert "network.layer1" in sentence
    assert "\n" not in sentence


class Idle(nn.Module):
    """A network with a layer that its forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(144, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))


def test_a_hook_that_does_not_fire_is_an_error(x: Tensor) -> None:
    with pytest.raises(ForeshotError, match="^student layer 'idle': it did not run"):
        Distiller(Idle(), Idle(), [on_features(("idle", "body"))])(x)
    with pytest.raises(ForeshotError, match="^teacher layer 'idle': it did not run"):
        Distiller(Idle(), Idle(), [on_features(("body", "idle"))])(x)
    with pytest.raises(ForeshotError, match="did not run"):
        distiller = Distiller(Idle(), Idle(), [on_features(("body", "body"))])
        distiller(x)
        distiller.student.forward = lambda x: x.flatten(1)[:, :4] * 1.0  # type: ignore[method-assign]
        distiller(x)  # what was caught before does not count


def test_dictated_labels_speak_in_the_teachers_stead(
    tiny: Tiny, student: Normalized, x: Tensor
) -> None:
    distiller = Distiller(student, tiny.teacher, [Term(loss=KD(temperature=4))]).eval()
    plain = distiller(x)
    dictated = torch.full((16,), -1)
    dictated[[0, 5]] = torch.tensor([3, 0])
    outputs = distiller(x, dictated=dictated)
    others = dictated < 0
    assert torch.equal(outputs["teacher_logits"][others], plain["teacher_logits"][others])
    certain = (outputs["teacher_logits"][[0, 5]] / 4).softmax(1)
    torch.testing.assert_close(certain, F.one_hot(torch.tensor([3, 0]), 4).float())
    # KL to a hard label is its cross-entropy.
    hard = F.cross_entropy(
        outputs["student_logits"][[0, 5]] / 4, torch.tensor([3, 0]), reduction="sum"
    )
    soft = kd(plain["student_logits"][others], plain["teacher_logits"][others], 4) * 14
    torch.testing.assert_close(outputs["loss"], (16 * hard + soft) / 16)
    assert torch.equal(distiller(x, dictated=torch.full((16,), -1))["loss"], plain["loss"])


def test_any_pair_of_modules_will_do() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    teacher = Rule(lambda x: x.flatten(1)[:, :3])
    noise = torch.rand((5, 1, 2, 2), generator=generator(0, "any"))
    outputs = Distiller(student, teacher, [Term(loss=KD(temperature=1))])(noise)
    torch.testing.assert_close(outputs["loss"], kd(student(noise), noise.flatten(1)[:, :3], 1))


@pytest.mark.parametrize(
    "fields", [{"weight": -1}, {"loss": {"name": "kd", "temperature": 0}}, {"nonsense": 1}]
)
def test_terms_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="greater than|extra|Extra"):
        Term.model_validate({"loss": {"name": "kd"}, **fields})


def test_a_term_is_written_as_it_is_read(tiny: Tiny, student: Normalized, x: Tensor) -> None:
    pairs = [("network.layer1", "network.layer1")]
    term = Term(Squared(), 1000, at=pairs)
    assert (term.weight, term.at) == (1000, tuple(pairs))
    assert Term(KD(temperature=2), 3) == Term(loss=KD(temperature=2), weight=3)
    with pytest.raises(TypeError, match="multiple values"):
        Term(KD(), loss=KD())


def test_hooks_go_with_the_distiller(tiny: Tiny, student: Normalized, x: Tensor) -> None:
    layer = student.get_submodule("network.layer1")
    distiller = Distiller(
        student, tiny.teacher, [on_features(("network.layer1", "network.layer1"))]
    )
    assert len(layer._forward_hooks) == 1
    twin = deepcopy(distiller.eval())
    assert torch.equal(twin(x)["loss"], distiller(x)["loss"])
    del distiller
    assert not layer._forward_hooks
    assert not tiny.teacher.get_submodule("network.layer1")._forward_hooks
    twin(x)


class Overwriting(nn.Module):
    """As many networks: the activation is applied in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(144, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x.flatten(1)))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_feature_that_is_overwritten_is_an_error(role: str, x: Tensor) -> None:
    pair = ("body", "relu") if role == "student" else ("relu", "body")
    with pytest.raises(ForeshotError, match=f"^{role} layer 'body': the network changes its"):
        Distiller(Overwriting(), Overwriting(), [on_features(pair)])(x)


def test_a_layer_may_return_a_tuple_but_no_dict(x: Tensor) -> None:
    class Wrapped(Idle):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(144, 4), Rule(wrap))

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x.flatten(1))
            return out["out"] if isinstance(out, dict) else out[0]

    pairs = on_features(("body", "body"))
    outputs = Distiller(Wrapped(lambda z: (z, 1)), Wrapped(lambda z: (z, 1)), [pairs])(x)
    assert outputs["loss"] > 0
    with pytest.raises(ForeshotError, match="expected a tensor, found dict"):
        Distiller(Wrapped(lambda z: (z, 1)), Wrapped(lambda z: {"out": z}), [pairs])(x)


class Scaled(Loss):
    """Squares of a learned multiple, for tests alone."""

    name: Literal["scaled"] = "scaled"
    on_features: ClassVar[bool] = True
    needs_index: ClassVar[bool] = True

    def learn(self, pairs: Sequence[Pair], samples: int | None) -> nn.Module:
        assert samples == 16
        return nn.Linear(pairs[0][0].shape[1], pairs[0][1].shape[1])

    def value(self, signals: Signals, learned: nn.Module | None) -> Tensor:
        assert learned is not None
        assert signals.index is not None
        ((student, teacher),) = signals.pairs
        return (learned(student.mean((2, 3))) - teacher.mean((2, 3))).square().mean()


def test_what_a_loss_learns_is_seeded_trained_and_saved(
    tiny: Tiny, student: Normalized, x: Tensor, keep_rng: None
) -> None:
    before = state_digest(student)
    term = Term(Scaled(), at=[("network.layer1", "network.layer3")])

    def make(**options: Any) -> Distiller:
        return Distiller(student, tiny.teacher, [term], samples=16, **options)

    distiller, again, other = make(example=x), make(example=x), make(example=x, seed=1)
    assert distiller.needs == {"index"}
    weight = "learned.0_scaled.weight"
    assert distiller.state_dict()[weight].shape == (32, 8)
    assert torch.equal(distiller.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(distiller.state_dict()[weight], other.state_dict()[weight])
    assert state_digest(student) == before
    distiller(x, index=torch.arange(16))["loss"].backward()
    assert distiller.get_parameter(weight).grad is not None
    with pytest.raises(ForeshotError, match="term 0_scaled: expected the index of each image"):
        distiller(x)
    with pytest.raises(ForeshotError, match="term 0_scaled: expected an example"):
        make()
    with pytest.raises(ForeshotError, match="term 0_scaled: expected the number of samples"):
        Distiller(student, tiny.teacher, [term], example=x)
    with pytest.raises(ValueError, match="loss 'scaled' compares features: expected at, pairs of"):
        Term(Scaled())


def test_teacher_and_student_of_other_classes_cannot_be_compared(tiny: Tiny, x: Tensor) -> None:
    student = build(ResNet(depth=8, width=0.5), tiny.train.images, 5, 1, "student")
    with pytest.raises(ForeshotError, match=r"\(16, 5\) of the student and \(16, 4\)"):
        Distiller(student, tiny.teacher, [Term(KD())])(x)
