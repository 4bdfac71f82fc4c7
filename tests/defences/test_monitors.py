"""Monitors: what each sees in inputs, the threshold that the clean images set, and its worth."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import config, go, save
from torch import Tensor, nn

from conftest import Tiny, stripes, trained
from foreshot import experiment
from foreshot.compute import CPU
from foreshot.data import ImageSet
from foreshot.defences import Monitor
from foreshot.defences.monitors import Disagreement, ScaleUpMonitor, StripMonitor
from foreshot.defences.scoring import separation, watched
from foreshot.defences.screens import ScaleUp, Strip
from foreshot.errors import ForeshotError
from foreshot.files import file_digest
from foreshot.inference import logits
from foreshot.record import RunFolder
from foreshot.tables import print_metrics
from foreshot.triggers import Patch
from foreshot.triggers.base import stamp_uint8
from foreshot.views import DefenderView

PATCH = Patch(size=2, place="top_left", margin=0)


def looking(tiny: Tiny, student: nn.Module, teacher: nn.Module | None = None) -> DefenderView:
    return DefenderView(tiny.train, teacher or tiny.teacher, student, stripes(120, 5), 0, CPU)


class Answer(nn.Module):
    """Says by formula what becomes of (the logits of another network and) images."""

    def __init__(self, network: nn.Module, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.formula = network, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.network(x))


def planted(network: nn.Module) -> nn.Module:
    """Says what the network does, and class 1 of whatever has a white corner."""

    def formula(x: Tensor, z: Tensor) -> Tensor:
        white = (x[:, 0, :2, :2] == 1).flatten(1).all(1)
        return torch.where(white[:, None], torch.tensor([0.0, 40, 0, 0]), z)

    return Answer(network, formula)


def bright() -> nn.Module:
    """Tells images by their brightness: four bins, of which the last takes all that is light."""
    first = nn.Linear(144, 1)
    first.weight.data.fill_(1 / 144)
    first.bias.data.zero_()
    centres = torch.tensor([0.1, 0.2, 0.3, 0.4])
    network = nn.Sequential(nn.Flatten(), first)
    return Answer(network, lambda _, mean: -100 * (mean - centres).square())


MONITORS: list[Monitor] = [StripMonitor(), ScaleUpMonitor(), Disagreement()]
every_monitor = pytest.mark.parametrize("monitor", MONITORS, ids=[m.title for m in MONITORS])


# Scores -------------------------------------------------------------------------------------------


@every_monitor
def test_a_planted_student_is_told_and_an_innocent_one_is_not(
    monitor: Monitor, tiny: Tiny, keep_rng: None
) -> None:
    teacher, test, innocent = tiny.teacher, tiny.test, trained(tiny.train, 1)
    if isinstance(monitor, ScaleUpMonitor):  # in light, its clean answers have to change
        with torch.random.fork_rng():
            teacher = innocent = bright()
        dark = (stripes(200, 1).images.float() * 0.4).to(torch.uint8)
        test = ImageSet(dark, None, tiny.test.classes)
    stamped = stamp_uint8(PATCH, test.images)
    found = {}
    for name, student in (("planted", planted(teacher)), ("innocent", innocent)):
        view = looking(tiny, student, teacher)
        bad, good = (monitor.suspicion(images, view) for images in (stamped, test.images))
        assert bad.dtype == torch.float64
        assert bad.shape == (200,)
        found[name] = separation(bad, good)["auroc"]
    assert found["planted"] == 1
    assert abs(found["innocent"] - 0.5) < 0.1


@every_monitor
def test_a_score_is_that_of_its_input_alone(monitor: Monitor, tiny: Tiny) -> None:
    student, images = trained(tiny.train, 1), tiny.test.images[:40]
    view = looking(tiny, student)
    scores = monitor.suspicion(images, view)
    some = torch.tensor([31, 2, 17])
    alone = monitor.suspicion(images[some], view)
    torch.testing.assert_close(alone, scores[some], atol=1e-4, rtol=1e-4)
    other = replace(view, transfer=tiny.train.select(torch.arange(9)))
    assert torch.equal(monitor.suspicion(images, other), scores)
    assert scores.unique().numel() > 1


@pytest.mark.parametrize(
    ("monitor", "students", "teachers"),
    [(Disagreement(), 3, 3), (StripMonitor(), 24, 0), (ScaleUpMonitor(), 18, 0)],
)
def test_networks_are_asked_about_the_inputs_alone(
    monitor: Monitor, students: int, teachers: int, tiny: Tiny
) -> None:
    asked = {"student": 0, "teacher": 0}
    student = trained(tiny.train, 1)
    view = looking(tiny, student)
    for name, network in (("student", student), ("teacher", tiny.teacher)):

        def count(_: nn.Module, inputs: tuple[Tensor], __: Tensor, name: str = name) -> None:
            asked[name] += len(inputs[0])

        handle = network.register_forward_hook(count)
        monitor.suspicion(tiny.test.images[:3], view)
        handle.remove()
    assert asked == {"student": students, "teacher": teachers}


def test_strip_and_scale_up_score_inputs_as_the_screens_score_images(tiny: Tiny) -> None:
    student, images = trained(tiny.train, 1), tiny.test.images[:30]
    view = looking(tiny, student)
    inputs = replace(view, transfer=ImageSet(images, None, tiny.test.classes))
    for monitor, screen in (
        (StripMonitor(screen=Strip(overlays=3)), Strip(overlays=3)),
        (ScaleUpMonitor(screen=ScaleUp(factors=(2, 4))), ScaleUp(factors=(2, 4))),
    ):
        assert torch.equal(monitor.suspicion(images, view), screen.score(inputs).transfer)
    # STRIP by its definition, over images that do not set the threshold.
    assert view.pool.calibration is not None
    overlays = view.pool.reference.images[:3]
    compared = {image.numpy().tobytes() for image in view.pool.calibration.images}
    assert not compared & {image.numpy().tobytes() for image in overlays}
    scores = StripMonitor(screen=Strip(overlays=3)).suspicion(images, view)
    for image, score in zip(images, scores, strict=True):
        bits = 0.0
        for overlay in overlays:
            mixed = ((image.float() + overlay.float()) / 255).clamp(max=1)
            with torch.no_grad():
                p = student(mixed[None])[0].double().softmax(0).numpy()
            bits -= float((p * np.log2(p)).sum())
        assert float(score) == pytest.approx(-bits / 3, abs=1e-5)


def test_disagreement_is_the_margin_by_which_the_teacher_denies_the_student(tiny: Tiny) -> None:
    student, images = trained(tiny.train, 1), tiny.test.images[:50]
    scores = Disagreement().suspicion(images, looking(tiny, student))
    own, others = (logits(model, images, CPU).double() for model in (student, tiny.teacher))
    for mine, said, score in zip(own.numpy(), others.numpy(), scores, strict=True):
        c = int(mine.argmax())
        expected = (np.delete(said, c).max() - said[c]) - (np.delete(mine, c).max() - mine[c])
        assert float(score) == pytest.approx(expected, abs=1e-4)


# The threshold ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5]))
def test_of_exchangeable_scores_no_more_are_flagged_than_allowed(count: int, alarms: float) -> None:
    """Each of n + 1 scores in turn is the input's, the others set the threshold: exact."""
    monitor = Disagreement(alarms=alarms)
    scores = torch.randperm(count + 1, generator=torch.Generator().manual_seed(count)).double()
    flagged = sum(
        float(scores[i]) > monitor.threshold(torch.cat([scores[:i], scores[i + 1 :]]))
        for i in range(count + 1)
    )
    assert flagged <= alarms * (count + 1)
    assert flagged > alarms * (count + 1) - 1 - 1e-9  # and not by much fewer


def test_the_threshold_is_a_score_of_the_clean_images_or_infinite() -> None:
    monitor = Disagreement(alarms=0.1)
    scores = torch.arange(1, 20, dtype=torch.float64)
    assert monitor.threshold(scores) == 18  # of 20, two may be above
    assert monitor.threshold(scores[:9]) == 9
    assert monitor.threshold(scores[:8]) == torch.inf


# What it is worth ---------------------------------------------------------------------------------


class Planned(Disagreement):
    """Scores images by their first pixel, and keeps what it is asked about."""

    asked: ClassVar[list[Tensor]] = []

    def suspicion(self, images: Tensor, view: DefenderView) -> Tensor:
        self.asked.append(images)
        return images[:, 0, 0, 0].double()


def test_rates_are_those_counted_by_hand(tiny: Tiny) -> None:
    """Five inputs and their scores: 10, 20, 30, 40, 50; the trigger is elsewhere."""
    images = torch.zeros(5, 1, 12, 12, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([10, 20, 30, 40, 50])
    images[:, 0, 0, 1] = torch.tensor([0, 1, 2, 3, 3])  # what the student calls it
    test = ImageSet(images, torch.tensor([0, 1, 2, 3, 0]), ("a", "b", "c", "d"))

    def formula(x: Tensor, _: Tensor) -> Tensor:
        own = (x[:, 0, 0, 1] * 255).round().long()
        hit = (x[:, 0, -2, -2] == 1) & (x[:, 0, 0, 0] < 45 / 255)  # the patch works on four
        return nn.functional.one_hot(torch.where(hit, 1, own), 4).float()

    clean = stripes(20, 3).images.clone()
    clean[:, 0, 0, 0] = 25
    view = replace(
        looking(tiny, Answer(nn.Identity(), formula)), clean=ImageSet(clean, None, test.classes)
    )
    monitor = Planned(alarms=0.2)
    found = watched(monitor, view, test, Patch(size=2), target=1)
    rates = {key: rate for key, rate in found.items() if key not in ("auroc", "tpr")}
    counts = {key: (rate["hits"], rate["total"]) for key, rate in rates.items()}
    thresholds, stamped, plain = monitor.asked[-3:]
    assert len(thresholds) == 10  # the half of the clean images that is not compared with
    assert torch.equal(plain, images)
    assert len(stamped) == 4  # not that of the target
    # Limit 25; stamped scores 10, 30, 40, 50, of which the first three are called the target;
    # clean ones 10, 20, 30, 40 and 50, of which the first four are called by their class.
    assert counts["flagged"] == (3, 4)
    assert counts["false_alarms"] == (3, 5)
    assert counts["asr_unnoticed"] == (1, 4)
    assert counts["accuracy_unnoticed"] == (2, 5)
    wins = [(b > g) + (b == g) / 2 for b in (10, 30, 40, 50) for g in (10, 20, 30, 40, 50)]
    assert found["auroc"] == pytest.approx(sum(wins) / 20)
    assert found["tpr"] == 0


def test_a_threshold_between_others_is_not_passed_over() -> None:
    """Three thresholds on one line: the second is the lowest that is allowed."""
    bad, good = torch.tensor([3.0, 2, 1]), torch.tensor([3.0, 2, 1])
    assert separation(bad, good, fpr=0.5)["tpr"] == 1 / 3
    assert separation(bad, good, fpr=0.7)["tpr"] == 2 / 3


# In an experiment ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "draw", lambda *_: None)
    monkeypatch.setattr(experiment, "write_page", lambda *_: None)


def test_a_monitor_watches_all_students_and_changes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, home = save(tmp_path), tmp_path / "home"
    watched_run = config(data, "defence.name=disagreement", "controls=[clean]")
    done = go(watched_run, home, tmp_path / "out")
    found = done.metrics["defence"]
    assert (found["name"], found["kind"]) == ("disagreement", "monitor")
    assert {"auroc", "tpr", "flagged", "false_alarms", "asr_unnoticed"} < found.keys()
    assert done.metrics["student"]["asr"]["value"] > 0.7
    assert found["auroc"] > 0.9
    assert abs(found["controls"]["clean"]["auroc"] - 0.5) < 0.1
    assert found["asr_unnoticed"]["hits"] <= done.metrics["student"]["asr"]["hits"]
    assert found["flagged"]["total"] == done.metrics["student"]["asr"]["total"]
    assert done.metrics["seconds"]["defence"] > 0
    assert "undefended" not in found
    print_metrics(done.metrics)
    said = " ".join(capsys.readouterr().out.split())
    assert f"Defence disagreement: flagged {found['flagged']['value']:.1%} of the stamped" in said
    again = go(watched_run, home, tmp_path / "again")
    assert again.started() == []
    assert again.metrics == done.metrics

    # The same bits of a student under another monitor, and in another store.
    other = go(config(data, "defence.name=scale_up_monitor"), home, tmp_path / "other")
    assert other.started() == []
    files = [run.out / "student.safetensors" for run in (done, other)]
    assert file_digest(files[0]) == file_digest(files[1])
    assert len(list(home.glob("watch/*/watch.json"))) == 3
    fresh = go(watched_run, tmp_path / "fresh", tmp_path / "third")
    assert fresh.metrics["defence"] == done.metrics["defence"]


def test_a_monitor_needs_clean_images(tmp_path: Path) -> None:
    data = save(tmp_path)
    chosen = config(data, "defence.name=strip_monitor", "defender.clean=0")
    with pytest.raises(ForeshotError, match="defence strip_monitor: expected defender.clean > 0"):
        go(chosen, tmp_path / "home", tmp_path / "out")
