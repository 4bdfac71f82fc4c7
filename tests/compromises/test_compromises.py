"""A compromised teacher is trained by the formula, and its student inherits what it is to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import ARCHITECTURE, Tiny
from foreshot.compression.base import trainable
from foreshot.compromises import COMPROMISES, Adba, Compromise, Scar
from foreshot.compromises.adba import Together
from foreshot.compromises.scar import implicit
from foreshot.compute import CPU
from foreshot.distillation import KD, Distiller, Term
from foreshot.inference import logits
from foreshot.models import build
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import state_digest
from foreshot.training import Samples, Training, fit
from foreshot.triggers import Blend, Trigger
from foreshot.triggers.base import stamp_uint8
from foreshot.triggers.learned import save_picture
from foreshot.views import AttackerView

SHORT = Training(epochs=1, batch=40, lr=0.05)
QUICK: dict[str, dict[str, Any]] = {
    "adba": {"shadow": ARCHITECTURE, "training": SHORT, "rehearsal": SHORT},
    "scar": {"surrogate": ARCHITECTURE, "training": SHORT, "rounds": 1, "steps": 2, "inner": 1},
}


def view(tiny: Tiny, trigger: Trigger | None = None) -> AttackerView:
    trigger = trigger or tiny.trigger
    return AttackerView(tiny.train.images, tiny.teacher, trigger, tiny.target, 0, CPU)


def implanted(tiny: Tiny, rule: Compromise, known: AttackerView, folder: Path) -> Any:
    teacher = trainable(tiny.teacher)
    assert tiny.train.labels is not None
    return teacher, rule.implant(teacher, known, tiny.train.labels, folder / "checkpoint")


@pytest.mark.parametrize("key", COMPROMISES)
def test_a_compromise_is_deterministic_and_leaves_the_clean_teacher(
    key: str, tiny: Tiny, tmp_path: Path, keep_rng: None
) -> None:
    rule, before = COMPROMISES[key].model_validate(QUICK[key]), state_digest(tiny.teacher)
    known = view(tiny, Blend())
    first, pattern = implanted(tiny, rule, known, tmp_path)
    (tmp_path / "checkpoint").unlink(missing_ok=True)
    again, other = implanted(tiny, rule, known, tmp_path)
    assert state_digest(first) == state_digest(again) != before
    assert state_digest(tiny.teacher) == before
    assert (pattern is None) == (key == "scar")
    if pattern is not None:
        assert (pattern.dtype, pattern.shape) == (torch.uint8, tiny.train.shape)
        assert torch.equal(pattern, other)


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, seed: int, side: int = 4, classes: int = 4) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, side * side, generator=random) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).to(self.weight) @ self.weight.T


def batch() -> tuple[Tensor, Tensor]:
    x = torch.rand((5, 1, 4, 4), generator=torch.Generator().manual_seed(9))
    return x, torch.tensor([0, 1, 2, 3, 0])


def small(teacher: nn.Module, trigger: Trigger) -> AttackerView:
    return AttackerView((batch()[0] * 255).to(torch.uint8), teacher, trigger, 2, 0, CPU)


def ce(said: Tensor, y: Tensor) -> Tensor:
    return -said.log_softmax(1)[range(len(y)), y].mean()


def distance(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student)."""
    p, q = ((z / temperature).log_softmax(1) for z in (teacher, student))
    return (p.exp() * (p - q)).sum(1).mean() * temperature**2


def test_each_of_adbas_three_is_moved_by_its_own_loss() -> None:
    teacher, shadow, trigger = Linear(0), Linear(1), Blend(opacity=0.3, pattern="uniform")
    rule = Adba(alpha=0.4, beta=0.7, temperature=3, pattern_rate=25)
    together = Together(rule, teacher, shadow, small(teacher, trigger))
    x, y = batch()
    together(x, y)["loss"].backward()

    pattern = trigger.picture((1, 4, 4)).requires_grad_()
    stamped, target = 0.7 * x + 0.3 * pattern, torch.full((5,), 2)
    fooled = ce(teacher(stamped), target)
    of_teacher = ce(teacher(x), y) + 0.7 * fooled
    of_shadow = 0.4 * distance(teacher(x).detach(), shadow(x), 3) + 0.6 * ce(shadow(x), y)
    of_pattern = 0.7 * fooled + ce(shadow(stamped), target)
    for found, loss, weight, scale in [
        (teacher.weight, of_teacher, teacher.weight, 1),
        (shadow.weight, of_shadow, shadow.weight, 1),
        (together.raw, of_pattern, pattern, 5),
    ]:
        (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert found.grad is not None
        torch.testing.assert_close(found.grad, scale * expected)


def test_the_pattern_stays_in_range_and_is_what_sgd_would_make_of_it() -> None:
    teacher, trigger = Linear(0), Blend(pattern="uniform")
    together = Together(Adba(pattern_rate=49), teacher, None, small(teacher, trigger))
    start = together.pattern().detach()
    torch.testing.assert_close(start, trigger.picture((1, 4, 4)))
    slope = torch.linspace(-0.1, 0.1, 16).reshape(1, 4, 4)
    (together.pattern() * slope).sum().backward()
    torch.optim.SGD([together.raw], lr=0.1).step()
    torch.testing.assert_close(together.pattern(), (start - 0.1 * 49 * slope).clamp(0, 1))


def test_without_a_pattern_adba_trains_the_teacher_alone(tiny: Tiny, tmp_path: Path) -> None:
    rule = Adba.model_validate(QUICK["adba"] | {"training": {**SHORT.model_dump(), "epochs": 3}})
    teacher, pattern = implanted(tiny, rule, view(tiny), tmp_path)
    assert pattern is None
    assert asr(teacher, tiny, tiny.trigger) > 0.9 > 0.2 > asr(tiny.teacher, tiny, tiny.trigger)


def test_the_implicit_gradient_is_that_of_the_minimum() -> None:
    """Finite differences of a ridge regression that is solved in closed form."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((6, 2), generator=random, dtype=torch.float64)
    slope = torch.randn((2, 3), generator=random, dtype=torch.float64)
    answers = torch.randn((6, 3), generator=random, dtype=torch.float64)

    def solved(z: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x + torch.eye(2, dtype=x.dtype), x.T @ z)

    def found(terms: int, rate: float = 0.1) -> Tensor:
        leaf, w = answers.clone().requires_grad_(), solved(answers).requires_grad_()
        inner = ((x @ w - leaf).square().sum() + w.square().sum()) / 2
        return implicit(inner, [w], [slope], leaf, rate, terms)

    step = 1e-5 * torch.eye(18, dtype=x.dtype).reshape(18, 6, 3)
    changes = [((solved(answers + s) - solved(answers - s)) * slope).sum() / 2e-5 for s in step]
    torch.testing.assert_close(found(400), torch.stack(changes).reshape(6, 3))
    # A single term is one step of gradient descent.
    torch.testing.assert_close(found(1), 0.1 * x @ slope)


def test_scars_objective_has_the_gradient_of_the_formula() -> None:
    teacher, student, trigger = Linear(0).double(), Linear(1).double(), Blend(opacity=0.3)
    rule = Scar(alpha=0.5, beta=0.6, gamma=1.5, delta=0.8, temperature=2, rate=0.2, terms=3)
    x, y = batch()
    x = x.double()
    rule.objective(teacher, student, small(teacher, trigger), x, y).backward()
    assert teacher.weight.grad is not None

    stamped, target = trigger.stamp(x), torch.full((5,), 2)

    def inner(w: Tensor, f: Tensor) -> Tensor:
        heard, said = x.flatten(1) @ w.T, x.flatten(1) @ f.T
        return ce(heard, y) + 0.8 * distance(said, heard, 2)

    w, f = student.weight.detach().requires_grad_(), teacher.weight.detach().requires_grad_()
    both = torch.autograd.functional.hessian(lambda a, b: inner(a, b), (w, f))
    size = w.numel()
    hessian, mixed = (part.reshape(size, size) for part in both[0])  # type: ignore[union-attr]
    outer = 0.6 * ce(x.flatten(1) @ w.T, y) + 1.5 * ce(stamped.flatten(1) @ w.T, target)
    g = torch.autograd.grad(outer, w)[0].flatten()
    v = torch.zeros_like(g)
    for _ in range(3):
        v = v - 0.2 * hessian @ v + g
    direct = ce(x.flatten(1) @ f.T, y) + 0.5 * ce(stamped.flatten(1) @ f.T, y)
    expected = torch.autograd.grad(direct, f)[0].flatten() - 0.2 * mixed.T @ v
    torch.testing.assert_close(teacher.weight.grad.flatten(), expected)
    assert student.weight.grad is None


def asr(model: nn.Module, tiny: Tiny, trigger: Trigger) -> float:
    assert tiny.test.labels is not None
    others = stamp_uint8(trigger, tiny.test.images[tiny.test.labels != tiny.target])
    return float((logits(model, others, CPU).argmax(1) == tiny.target).double().mean())


def accuracy(model: nn.Module, tiny: Tiny) -> float:
    said = logits(model, tiny.test.images, CPU).argmax(1)
    return float((said == tiny.test.labels).double().mean())


def distilled(teacher: nn.Module, tiny: Tiny) -> Normalized:
    """A student of a clean set, by the teacher's answers alone."""
    student = build(ARCHITECTURE, tiny.train.images, 4, 0, "student")
    schedule = Training(epochs=8, batch=40, lr=0.1)
    distiller = Distiller(student, teacher, [Term(KD())])
    fit(distiller, Samples(tiny.train.images), schedule, CPU, seed=0, stage="student")
    return student


def test_a_student_inherits_adbas_backdoor_from_clean_images(tiny: Tiny, tmp_path: Path) -> None:
    start, default = Blend(opacity=0.3), Adba()
    rule = Adba(
        shadow=ARCHITECTURE,
        rehearsal=Training(epochs=5, batch=40, lr=0.1),
        training=default.training.model_copy(update={"batch": 40}),
    )
    teacher, pattern = implanted(tiny, rule, view(tiny, start), tmp_path)
    save_picture(tmp_path / "pattern.png", pattern)
    learned = start.learned(tmp_path / "pattern.png")
    student, control = distilled(teacher, tiny), distilled(tiny.teacher, tiny)
    assert min(accuracy(teacher, tiny), accuracy(student, tiny)) > 0.95
    assert asr(teacher, tiny, learned) > 0.9
    assert asr(student, tiny, learned) > asr(control, tiny, learned) + 0.4
    assert asr(student, tiny, start) < 0.2
