"""The verdict of an audit: against formulas, and its false alarms by simulation."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, expon, hypergeom, mannwhitneyu
from torch import Tensor, nn

from conftest import SIDE, Tiny, stripes
from foreshot.attacks import Pgd
from foreshot.audit import distilled
from foreshot.audit.data import audit
from foreshot.audit.verdict import set_test
from foreshot.compute import CPU
from foreshot.data import ImageSet
from foreshot.defences import Combined, Scores, Screen, judge
from foreshot.defences.base import margin
from foreshot.defences.conformal import benjamini_hochberg, exponential_tails, p_values
from foreshot.defences.pool import Pool
from foreshot.defences.scoring import separation
from foreshot.defences.screens import (
    LabelDisagreement,
    Mahalanobis,
    NearDuplicate,
    Scan,
    SpectralSignature,
    TeacherConsistency,
)
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.models.checkpoint import load_model, state_digest
from foreshot.poison import Poison
from foreshot.progress import Event
from foreshot.store import Store
from foreshot.training import Training
from foreshot.views import AttackerView, DefenderView


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def poison(tiny: Tiny) -> Poison:
    view = AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, tiny.target, 0, CPU)
    return Pgd(count=40, epsilon=30, steps=20, retries=1).craft(view)


# The set's p-value -------------------------------------------------------------------------------


def test_p_values_of_clean_sets_hold_and_are_not_too_careful() -> None:
    found = []
    for seed in range(100):
        shared = normal(160, seed=seed)
        screens = [(shared + normal(160, seed=1000 * k + seed)).round(decimals=1) for k in (1, 2)]
        found.append(set_test([Scores(s[:120], s[120:]) for s in screens], 0.05, seed).p)
    for level in (0.05, 0.1, 0.2, 0.5):
        assert sum(p <= level for p in found) <= binom.ppf(0.999, len(found), level)
    assert np.mean(found) < 0.65


def test_the_p_value_of_one_screen_is_that_of_a_slow_permutation_test() -> None:
    transfer, clean = normal(60, seed=3), normal(30, seed=4)
    transfer[:13] += 2.5
    pool = torch.cat([transfer, clean]).numpy()
    trusted = np.arange(90) >= 60
    places = sorted({round(x) for x in np.geomspace(1, 45, 40)})

    def statistic(trusted: np.ndarray) -> float:
        first = trusted[np.argsort(-pool)]
        return min(float(hypergeom.cdf(first[:m].sum(), 90, 30, m)) for m in places)

    random = np.random.default_rng(0)
    mine = statistic(trusted)
    drawn = [statistic(random.permutation(trusted)) <= mine * (1 + 1e-9) for _ in range(300)]
    expected = (1 + sum(drawn)) / 301
    found = set_test([Scores(transfer, clean)], 0.05, 0).p
    assert 0.01 < expected < 0.5  # neither is trivial
    assert found == pytest.approx(expected, abs=4 * (expected / 300) ** 0.5)


def even(count: int) -> Tensor:
    """Normal quantiles: scores of a set that is as clean as can be."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def test_the_smallest_share_is_found_and_half_of_it_is_not() -> None:
    transfer, clean = even(3000), even(300)
    smallest = set_test([Scores(transfer, clean)], 0.05, 0).smallest
    assert smallest is not None
    # At one place alone, P(no clean image among the first m) <= 0.05 from here on.
    first = next(m for m in range(1, 99) if hypergeom.cdf(0, 3300, 300, m) <= 0.05)
    assert first / 3000 < smallest < 2.5 * first / 3000
    for share, suspicious in ((0, False), (smallest / 2, False), (smallest, True)):
        poisoned = transfer.clone()
        poisoned[: round(share * 3000)] += 100
        assert (set_test([Scores(poisoned, clean)], 0.05, 0).p <= 0.05) == suspicious


def test_five_clean_images_can_find_nothing() -> None:
    transfer = normal(1000)
    transfer[:30] += 100
    found = set_test([Scores(transfer, normal(5, seed=1))], 0.001, 0)
    assert found.smallest is None
    assert found.p > 0.001


def test_a_little_poison_that_p_values_of_images_cannot_show_is_found() -> None:
    transfer, clean = even(5000), even(300)
    transfer[:120] += 6  # 2.4 %, for which Benjamini and Hochberg need 833 clean images
    assert set_test([Scores(transfer, clean)], 0.05, 0).p <= 0.05
    assert not len(benjamini_hochberg(p_values(Scores(transfer, clean)), 0.05))
    assert mannwhitneyu(transfer, clean, alternative="greater").pvalue > 0.05


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_without_clean_images_p_values_are_exponential_tails(scale: float) -> None:
    scores = -scale * torch.rand(20001, generator=torch.Generator().manual_seed(0)).double().log()
    expected = expon.sf(scores.numpy(), scale=scale)
    np.testing.assert_allclose(exponential_tails(scores), expected, atol=0.02)
    assert exponential_tails(torch.ones(10)).tolist() == [1] * 10


# A whole audit -----------------------------------------------------------------------------------


def test_poison_is_found_and_its_target_named(tiny: Tiny, poison: Poison) -> None:
    found = audit(poison.apply(tiny.train), tiny.teacher, clean=stripes(600, 5))
    assert list(found.scores) == [
        "consistency",
        "label_disagreement",
        "frequency",
        "detector",
        "near_duplicate",
    ]
    assert found.suspicious
    assert found.target == tiny.target
    guilty = torch.zeros(len(tiny.train), dtype=torch.bool).index_fill(0, poison.indices, True)
    assert found.left_out[guilty].double().mean() > 0.9
    assert found.left_out[~guilty].double().mean() < 0.1
    assert guilty[found.rank[:20]].all()


def test_the_images_p_values_are_those_of_the_combined_screen(tiny: Tiny) -> None:
    transfer = stripes(60, 7)
    view = DefenderView(transfer, tiny.teacher, None, stripes(80, 5), 3, CPU)
    verdict = judge(Combined(), view, 0.05)
    found = audit(transfer, tiny.teacher, clean=stripes(80, 5), seed=3)
    assert torch.equal(found.p, verdict.p)
    assert torch.equal(found.p[found.rank], found.p.sort().values)
    assert torch.equal(found.said, view.pool.teacher.said[:60])


def test_clean_sets_raise_no_more_alarms_than_stated(tiny: Tiny) -> None:
    """Forty sets with a clean set each, at a level at which some alarms are due."""
    random = torch.Generator().manual_seed(0)
    images = stripes(4000, 77)
    p = []
    for _ in range(40):
        order = torch.randperm(4000, generator=random)[:120]
        transfer, clean = images.select(order[:80]), images.select(order[80:])
        screens = (LabelDisagreement(), NearDuplicate())
        p.append(audit(transfer, tiny.teacher, clean=clean, screens=screens, alarm=0.2).set_p)
    for level in (0.05, 0.2, 0.5):
        assert sum(x <= level for x in p) <= binom.ppf(0.999, 40, level)
    assert 0.3 < np.mean(p) < 0.75


class Learned(SpectralSignature):
    """How surely a student says what the teacher says."""

    def suspicion(self, pool: Pool) -> Tensor:
        return -margin(pool.student.logits, pool.teacher.said)


class Whim(nn.Module):
    """A teacher of no rule: its answers can be learned by heart alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fc.weight.data, self.fc.bias.data = 9 * torch.eye(4), torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        ways = torch.linspace(90, 110, 4 * SIDE * SIDE).reshape(SIDE * SIDE, 4)
        return self.fc(torch.sin(x.flatten(1) @ ways))


def test_what_a_student_has_learned_by_heart_looks_like_the_clean_images_that_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distilled, "SCHEDULE", Training(epochs=40, lr=0.3))
    images, fair, unfair = stripes(450, 77), [], []
    for part in torch.randperm(450, generator=torch.Generator().manual_seed(0)).split(150):
        transfer, clean = images.select(part[:50]), images.select(part[50:])
        found = audit(transfer, Whim(), clean=clean, screens=[Learned()], distil=True)
        scores = found.scores["spectral_signature"]
        fair.append(separation(scores.transfer, scores.clean)["auroc"])
        folder = tmp_path / str(len(fair))
        distilled.distil(replace(found.view, clean=None, student=None), folder)
        other = load_model(folder / distilled.FILE).model
        scores = Learned().score(replace(found.view, student=other))
        unfair.append(separation(scores.transfer, scores.clean)["auroc"])
    # Of a student that has not learned from them: six standard errors.
    assert np.mean(unfair) > 0.7
    assert abs(np.mean(fair) - 0.5) < 0.1  # three standard errors


def test_a_student_of_the_set_is_looked_at_and_found_again(
    tiny: Tiny, poison: Poison, tmp_path: Path
) -> None:
    transfer, clean = poison.apply(tiny.train), stripes(600, 5)
    heard: list[Event] = []
    store = Store.open(heard.append, tmp_path)
    asked: dict[str, Any] = {"clean": clean, "seed": 1, "listener": heard.append}

    def worked() -> set[str]:
        stages = {event.stage for event in heard if event.kind == "advance"}
        heard.clear()
        return stages

    without = audit(transfer, tiny.teacher, store=store, **asked)
    assert {"teacher", "consistency"} < worked()
    found = audit(transfer, tiny.teacher, store=store, distil=True, **asked)
    assert worked() == {"student", "scan"}
    assert found.scores.keys() - without.scores.keys() == {"scan"}
    assert found.view.student is not None
    test = stripes(200, 6)
    assert test.labels is not None
    right = logits(found.view.student, test.images, CPU).argmax(1) == test.labels
    assert right.double().mean() > 0.9
    assert found.seconds["student"] > 0

    again = audit(transfer, tiny.teacher, store=store, distil=True, **asked)
    assert worked() == set()
    assert again.seconds == found.seconds
    alone = audit(transfer, tiny.teacher, distil=True, **asked)
    for other in (again, alone):
        assert torch.equal(other.p, found.p)
        assert torch.equal(other.scores["scan"].clean, found.scores["scan"].clean)


def test_a_combined_screen_with_a_student_is_another(tiny: Tiny, tmp_path: Path) -> None:
    screen = Combined(screens=(NearDuplicate(), Scan()))
    asked: dict[str, Any] = {"clean": stripes(80, 5), "screens": [screen]}
    transfer, store = stripes(90, 1), Store.open(lambda _: None, tmp_path)
    audit(transfer, tiny.teacher, store=store, **asked)
    found = audit(transfer, tiny.teacher, store=store, distil=True, **asked)
    alone = audit(transfer, tiny.teacher, distil=True, **asked)
    assert torch.equal(found.scores["combined"].transfer, alone.scores["combined"].transfer)


def test_for_a_student_the_teacher_is_not_asked_twice(tiny: Tiny) -> None:
    images = 0

    def counted(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
        nonlocal images
        images += len(inputs[0])

    tiny.teacher.requires_grad_(True)  # other tests distil from it, which freezes it
    before = state_digest(tiny.teacher)
    handle = tiny.teacher.register_forward_hook(counted)
    audit(stripes(90, 1), tiny.teacher, clean=stripes(80, 5), screens=[Scan()], distil=True)
    handle.remove()
    assert images == 90 + 80 + 2  # before and with the student, one to see if there is a gradient
    assert state_digest(tiny.teacher) == before
    assert all(parameter.requires_grad for parameter in tiny.teacher.parameters())


@pytest.mark.parametrize(
    ("screens", "clean", "sentence"),
    [
        ([TeacherConsistency()], 60, "distil: expected a screen that looks at a student, such as"),
        (None, 0, "distil: expected a screen that looks at a student, such as scan, which needs"),
        ([Scan()], 0, "screen scan: expected a clean set of the defender's"),
        ([Scan(), Scan()], 60, "screens: expected each once, found scan, scan"),
    ],
)
def test_a_student_for_nobody_is_refused_before_it_is_distilled(
    screens: list[Screen] | None, clean: int, sentence: str, tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(distilled, "distil", None)
    trusted = stripes(clean, 3) if clean else None
    with pytest.raises(ForeshotError, match=f"^{sentence}"):
        audit(stripes(40, 1), tiny.teacher, clean=trusted, screens=screens, distil=True)


def test_without_clean_images_poison_is_a_guess_and_clean_sets_are_not_suspicious(
    tiny: Tiny, poison: Poison
) -> None:
    found = audit(poison.apply(tiny.train), tiny.teacher)
    assert (found.calibrated, found.suspicious, found.smallest) == (False, True, None)
    assert found.target == tiny.target
    for seed in range(3):
        fresh = audit(stripes(300, 50 + seed), tiny.teacher)
        assert not fresh.suspicious
        assert not fresh.left_out.any()
        assert fresh.target is None
    p = torch.stack([exponential_tails(scores.transfer) for scores in found.scores.values()])
    assert torch.allclose(found.p, (p.amin(0) * len(p)).clamp(max=1))


def test_a_second_teacher_is_asked_and_bare_sets_have_no_labels_to_compare(tiny: Tiny) -> None:
    bare = [ImageSet(stripes(40, seed).images, None, tiny.train.classes) for seed in (1, 2)]
    found = audit(bare[0], tiny.teacher, clean=bare[1], second=tiny.teacher)
    expected = ["consistency", "second_teacher", "frequency", "detector", "near_duplicate"]
    assert list(found.scores) == expected
    with pytest.raises(ForeshotError, match="label_disagreement: expected labels"):
        audit(bare[0], tiny.teacher, screens=[LabelDisagreement()])


@pytest.mark.parametrize("bad", ["teacher", "second"])
def test_networks_that_answer_with_nan_are_refused(tiny: Tiny, bad: str) -> None:
    broken = deepcopy(tiny.teacher)
    next(broken.parameters()).data.fill_(torch.nan)
    networks = {"teacher": tiny.teacher, "second": tiny.teacher} | {bad: broken}
    with pytest.raises(ForeshotError, match="expected finite logits"):
        audit(tiny.test, networks["teacher"], clean=stripes(60, 3), second=networks["second"])


def test_a_screen_that_is_there_twice_is_refused(tiny: Tiny) -> None:
    twice = [TeacherConsistency(changes=(change,)) for change in ("jpeg", "blur")]
    with pytest.raises(ForeshotError, match="each once, found consistency, consistency"):
        audit(tiny.test, tiny.teacher, screens=twice)


def test_too_few_clean_images_for_a_covariance_are_one_sentence(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="screen mahalanobis: expected classes with several"):
        audit(tiny.test, tiny.teacher, clean=stripes(4, 3), screens=[Mahalanobis()])


def test_what_each_screen_costs_and_how_far_it_is(tiny: Tiny) -> None:
    heard: list[Event] = []
    found = audit(
        stripes(700, 1), tiny.teacher, screens=[TeacherConsistency()], listener=heard.append
    )
    for name in ("teacher", "consistency"):
        mine = [event for event in heard if event.stage == name]
        assert (mine[0].kind, mine[0].total) == ("start", 700)
        assert [event.done for event in mine if event.kind == "advance"][4:6] == [640, 700]
        assert mine[-1].values["images/s"] == pytest.approx(found.speed(name))
        assert found.speed(name) == 700 / found.seconds[name]


def test_views_are_not_shared(tiny: Tiny) -> None:
    found = audit(stripes(40, 1), tiny.teacher, screens=[NearDuplicate()])
    assert found.view.student is None
    assert replace(found, alarm=1.0).suspicious
