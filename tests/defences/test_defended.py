"""A defence in an experiment: what is removed, who sees what, and what is written down."""

import os
import signal
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small import BAD, CLEAN, NETWORK, TRAIN, TRANSFER, config, go, save
from torch import Tensor

from conftest import stripes
from foreshot import guard, stages
from foreshot.config import Config
from foreshot.defences import Verdict, judge
from foreshot.defences.distilling import ConsistencyWeighting
from foreshot.defences.pool import Pool
from foreshot.defences.scoring import quality
from foreshot.defences.screens import NearDuplicate, SpectralSignature
from foreshot.errors import ForeshotError
from foreshot.experiment import run
from foreshot.files import file_digest, read_json
from foreshot.guard import Guard
from foreshot.lesson import Lesson
from foreshot.metrics import evaluate
from foreshot.models.checkpoint import load_model, state_digest
from foreshot.poison import Poison
from foreshot.progress import Event
from foreshot.record import RunFolder, load_run
from foreshot.tables import print_metrics
from foreshot.views import DefenderView


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a third of the time, and are looked at elsewhere."""
    monkeypatch.setattr(RunFolder, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that the tests of this file share."""
    return tmp_path_factory.mktemp("home")


class Planted(NearDuplicate):
    """A screen that knows the poison by heart."""

    bad: ClassVar[set[bytes]] = set()

    def suspicion(self, pool: Pool) -> Tensor:
        known = [image.numpy().tobytes() in self.bad for x in pool.images() for image in x]
        return torch.tensor(known, dtype=torch.float64)


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bytes]]:
    """The images that each training sees, once it has run."""
    found: dict[str, set[bytes]] = {}

    def kept(module: Any, samples: Any, *rest: Any, real: Any = stages.fit, **keys: Any) -> None:
        found[keys["label"] or keys["stage"]] = rows(samples.images)
        real(module, samples, *rest, **keys)

    monkeypatch.setattr(stages, "fit", kept)
    return found


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[DefenderView]:
    """What the defender saw."""
    views: list[DefenderView] = []

    def kept(screen: Any, view: DefenderView, **rule: Any) -> Verdict:
        views.append(view)
        return judge(screen, view, **rule)

    monkeypatch.setattr(guard, "judge", kept)
    return views


def test_a_perfect_screen_removes_the_poison_and_the_backdoor(
    data: Path,
    home: Path,
    tmp_path: Path,
    seen: dict[str, set[bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = go(config(data), home, tmp_path / "plain")
    assert "defence" not in plain.metrics
    assert plain.metrics["student"]["asr"]["value"] > 0.8
    assert seen["student"] - seen["teacher"] == rows(plain.poison().images)

    controlled = config(data, "controls=[clean, trigger_only]", defence=Planted())
    poison = go(controlled, home, tmp_path / "out", until="poison").poison()
    Planted.bad = rows(poison.images)
    done = go(controlled, home, tmp_path / "out")
    assert done.metrics["student"]["asr"]["value"] < 0.3
    assert done.metrics["student"]["clean_accuracy"]["value"] > 0.8

    # Who saw what: the teacher is that of the plain run, which knows the clean images.
    assert "teacher" not in done.started()
    every, bad = rows(stripes(TRAIN, 0).images), rows(poison.images)
    assert seen["teacher"] == every
    clean = every - seen["control: clean"]
    assert len(clean) == CLEAN
    assert len(seen["control: clean"]) == TRANSFER
    assert len(seen["student"]) == TRANSFER - BAD
    assert seen["student"] < every - clean
    assert not seen["control: trigger_only"] & bad  # its images are those of the dirty labels
    kept = done.verdict().kept
    assert sorted([*kept.tolist(), *poison.indices.tolist()]) == list(range(TRANSFER))

    found = done.metrics["defence"]
    assert (found["name"], found["auroc"], found["tpr"]) == ("near_duplicate", 1.0, 1.0)
    hits = {key: (found[key]["hits"], found[key]["total"]) for key in found if "removed" in key}
    assert hits == {
        "removed": (BAD, TRANSFER),
        "poison_removed": (BAD, BAD),
        "clean_removed": (0, TRANSFER - BAD),
    }
    assert found["calibrated"] is True
    assert "undefended" not in found
    assert found["controls"]["clean"]["removed"]["hits"] == 0
    assert found["controls"]["clean"]["auroc"] is None
    assert found["controls"]["clean"]["target_found"] is None
    listed = read_json(done.out / "screen.json")
    assert (listed["images"], listed["removed"]) == (TRANSFER, BAD)
    assert listed["ranked"][:BAD] == poison.indices.tolist()
    assert sorted(listed["ranked"]) == list(range(TRANSFER))
    assert done.metrics["seconds"]["defence"] > 0
    assert {"screen.json", "screen.safetensors"} <= set(
        read_json(done.out / "manifest.json")["outputs"]
    )
    assert "clean" in read_json(done.out / "manifest.json")["inputs"]
    assert load_run(done.out).metrics["defence"] == found

    print_metrics(done.metrics)
    line = " ".join(capsys.readouterr().out.split())
    assert "Defence near_duplicate: removed 13.6% of the images, 100.0% of the poison and " in line
    assert "0.0% of the rest (AUROC 1.000, TPR 100.0% at an FPR of 1%)" in line

    again = go(controlled, home, tmp_path / "again")
    assert again.started() == []
    assert again.metrics == done.metrics


def test_without_a_defence_nothing_is_changed_by_the_defender(
    data: Path, home: Path, tmp_path: Path
) -> None:
    plain = go(config(data), home, tmp_path / "plain")
    other = go(config(data, "defender={clean: 7, remove: 0.5}"), home, tmp_path / "other")
    assert other.started() == []
    assert other.metrics == plain.metrics
    assert not list(other.out.glob("screen*"))
    defended = go(config(data, "defence.name=consistency"), home, tmp_path / "defended")
    shared = {"data", "teacher", "poison", "network", "compression", "distillation"}
    shared |= {"seed", "source", "versions", "device", "precision", "threads", "torch", "kernels"}
    for done, added in ((plain, set()), (defended, {"kept"})):
        (record,) = [
            read_json(file.parent / "done.json")
            for file in home.glob("student/*/model.safetensors")
            if file_digest(file) == file_digest(done.out / "student.safetensors")
        ]
        assert record["inputs"].keys() == shared | added

    # What a student is distilled on beside the set, for a screen to look at, is in its key.
    known = set(home.glob("student/*/done.json"))
    go(config(data, "defence.name=scan"), home, tmp_path / "scan", until="student")
    new = [read_json(file)["inputs"] for file in set(home.glob("student/*/done.json")) - known]
    assert sorted(sorted(inputs.keys() - shared) for inputs in new) == [["beside"], ["kept"]]

    # Without clean images scan is left out, and no student is distilled for it.
    bare = config(data, "defence.name=combined", "defender.clean=0")
    done = go(bare, tmp_path / "home", tmp_path / "bare", until="student")
    assert "student for the screen" not in done.started()


def test_a_screen_that_looks_at_a_student_gets_one_and_a_fixed_share_is_removed(
    data: Path, home: Path, tmp_path: Path, seen: dict[str, set[bytes]], looked: list[DefenderView]
) -> None:
    settings = ("defence.name=spectral_signature", "defender.remove=0.25", "target=2")
    done = go(config(data, *settings), home, tmp_path / "out")
    (view,) = looked
    verdict = done.verdict()
    scores = SpectralSignature().score(view).transfer
    assert torch.equal(verdict.scores, scores)
    assert set(verdict.flagged.tolist()) == set(scores.topk(TRANSFER // 4).indices.tolist())
    # What is scored, the student knows alike: images of the set, and clean ones to compare with.
    scored = view.pool.calibration
    assert scored is not None
    assert len(rows(scored.images) - rows(view.transfer.images)) == CLEAN // 2
    assert seen["student for the screen"] == rows(view.transfer.images) | rows(scored.images)
    assert seen["student"] == rows(view.transfer.images[verdict.kept])
    assert len(seen["student"]) == TRANSFER - TRANSFER // 4

    found, before = done.metrics["defence"], done.metrics["defence"]["undefended"]
    assert found["removed"]["hits"] == TRANSFER // 4
    assert found["calibrated"] is True
    assert before["asr"]["value"] > 0.7
    (file,) = [
        path
        for path in home.glob("student/*/model.safetensors")
        if state_digest(load_model(path).model) == state_digest(view.student or view.teacher)
    ]
    test = stripes(120, 1)
    again = evaluate(load_model(file).model, test, config(data).trigger, 2)
    assert again["asr"] == before["asr"]
    assert again["clean_accuracy"] == before["clean_accuracy"]


def test_the_defender_sees_no_secret_and_has_a_second_teacher_where_it_helps(
    data: Path, home: Path, tmp_path: Path, looked: list[DefenderView]
) -> None:
    done = go(config(data, "defence.name=combined"), home, tmp_path / "out", until="student")
    (view,) = looked
    assert "second teacher" in done.started()
    assert view.second is not None
    assert state_digest(view.second) != state_digest(view.teacher)
    assert view.teacher is not view.second
    assert view.student is not None
    assert view.clean is not None
    assert view.seed != config(data).seed  # the attacker's choice of images follows from that
    assert (len(view.transfer), len(view.clean)) == (TRANSFER, CLEAN)
    assert view.transfer.labels is None
    assert view.clean.labels is None
    held = [cell.cell_contents for cell in getattr(view.listener, "__closure__")]  # noqa: B009
    assert not any(isinstance(thing, stages.Stages | Config | Guard) for thing in held)
    poison = done.poison()
    assert torch.equal(view.transfer.images[poison.indices], poison.images)
    rest = torch.ones(TRANSFER).index_fill(0, poison.indices, 0).bool()
    parts = [rows(view.clean.images), rows(view.transfer.images[rest])]
    assert len(parts[0] | parts[1]) == TRAIN - BAD
    assert parts[0] | parts[1] < rows(stripes(TRAIN, 0).images)

    # Labels are looked at only where the config says so.
    labelled = config(data, "defence.name=label_disagreement", "defender.labels=true")
    go(labelled, home, tmp_path / "labelled", until="student")
    assert looked[1].transfer.labels is not None
    assert looked[1].second is None


def test_a_lesson_is_doubted_by_a_second_teacher_and_by_a_student_where_its_screens_ask_them(
    data: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views: list[DefenderView] = []

    def change(_: Any, lesson: Lesson, view: DefenderView) -> Lesson:
        views.append(view)
        return lesson

    monkeypatch.setattr(ConsistencyWeighting, "change", change)
    cases = (("consistency", set()), ("second_teacher", {"second"}), ("scan", {"student"}))
    for screen, asked in cases:
        defence = f"defence={{name: consistency_weighting, screens: [{{name: {screen}}}]}}"
        done = go(config(data, defence), tmp_path / "home", tmp_path / screen, until="student")
        assert {name for name in ("second", "student") if getattr(views[-1], name)} == asked
        begun = {"second": "second teacher", "student": "student for the lesson"}
        assert {name for name, title in begun.items() if title in done.started()} == asked


def test_the_attackers_surrogate_does_not_see_the_clean_images(
    data: Path, home: Path, tmp_path: Path, seen: dict[str, set[bytes]]
) -> None:
    settings = ("attack={name: fgsm, count: 5}", f"surrogate={NETWORK}", "defence.name=combined")
    for where, count in (("same", TRANSFER), ("disjoint", TRAIN // 2)):
        chosen = config(data, *settings, f"surrogate.data={where}", "defender.clean=80")
        go(chosen, home, tmp_path / where, until="poison")
        assert len(seen["surrogate"]) == count
    assert len(seen["teacher"]) == TRAIN // 2
    assert not seen["teacher"] & seen["surrogate"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("defence.name=beatrix", "defender.clean=0"),
            "defence beatrix: expected defender.clean > 0, found 0",
        ),
        (
            ("defence.name=label_disagreement",),
            "defence label_disagreement: expected defender.labels true, found false",
        ),
        (
            ("defence.name=combined", f"defender.clean={TRAIN}"),
            "defender.clean: expected fewer than the 300 training images, found 300",
        ),
    ],
)
def test_what_a_defence_lacks_is_said_before_anything_is_computed(
    settings: tuple[str, ...], sentence: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ForeshotError) as error:
        go(config(data, *settings), tmp_path / "home", tmp_path / "out")
    assert str(error.value) == sentence
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("defence.name=spectral", "test: defence.name: found 'spectral'; did you mean 'spectre'?"),
        ("defence=combind", "test: defence.name: found 'combind'; did you mean 'combined'?"),
        ("defence={}", "test: defence: expected {name: ...}, one of consistency, "),
        ("defender.drop=0", "test: defender.drop: input should be greater than 0, found 0"),
        ("defender.level=0", "test: defender.level: input should be greater than 0, found 0"),
        ("defender={level: 0.1, remove: 0.1}", "test: defender: expected one of level and remove"),
        ("defender.remove=1", "test: defender.remove: input should be less than 1, found 1"),
        ("defender.clean=-1", "test: defender.clean: input should be greater than or equal to 0"),
        ("defender.claen=3", "test: defender.claen: no such key; did you mean 'clean'?"),
    ],
)
def test_a_defence_that_there_is_not_is_one_sentence(
    setting: str, sentence: str, data: Path
) -> None:
    with pytest.raises(ForeshotError) as error:
        config(data, setting)
    assert str(error.value).startswith(sentence)


def test_too_few_clean_images_are_refused_before_anything_is_computed(
    data: Path, tmp_path: Path
) -> None:
    for settings, sentence in (
        (
            ("defence.name=consistency", "defender={clean: 96, drop: 0.02}"),
            "^screen consistency: expected at least 97 clean ",
        ),
        (
            ("defence={name: disagreement, alarms: 0.1}", "defender.clean=16"),
            "^monitor disagreement: expected at least 17 clean ",
        ),
    ):
        with pytest.raises(ForeshotError, match=sentence):
            go(config(data, *settings), tmp_path / "home", tmp_path / "out")
        assert not (tmp_path / "home").exists()


def test_a_defence_that_leaves_nothing_is_refused(data: Path, home: Path, tmp_path: Path) -> None:
    settings = ("defence.name=consistency", "defender.remove=0.9999")
    with pytest.raises(ForeshotError, match="^defence consistency: expected images to distil on, "):
        go(config(data, *settings), home, tmp_path / "out")


def test_a_killed_screening_is_taken_up_again(data: Path, home: Path, tmp_path: Path) -> None:
    chosen = config(data, "defence.name=mahalanobis", "seed=1")

    def child(stage: str, kind: str) -> None:
        def listen(event: Event) -> None:
            if (event.stage, event.kind) == (stage, kind):
                os.kill(os.getpid(), signal.SIGKILL)

        run(chosen, tmp_path / "out", store=tmp_path / "home", device="cpu", listener=listen)

    for moment in (("screen", "start"), ("screen", "end"), ("student", "epoch")):
        process = get_context("fork").Process(target=child, args=moment)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    done = go(chosen, tmp_path / "home", tmp_path / "out")
    assert done.started() == ["student"]
    whole = go(chosen, home, tmp_path / "whole")
    for name in ("screen.safetensors", "screen.json", "student.safetensors"):
        assert file_digest(done.out / name) == file_digest(whole.out / name)
    assert done.metrics["defence"] == whole.metrics["defence"]


def test_a_verdict_is_read_as_it_was_written(tmp_path: Path) -> None:
    scores = torch.tensor([0.5, 3.0, 0.5, 9.0], dtype=torch.float64)
    verdict = Verdict(torch.tensor([1, 3]), scores / 10, None, True, scores)
    assert verdict.kept.tolist() == [0, 2]
    assert verdict.ranked.tolist() == [3, 1, 0, 2]
    verdict.save(tmp_path / "v.safetensors")
    again = Verdict.load(tmp_path / "v.safetensors")
    for part in fields(Verdict):
        one, other = getattr(verdict, part.name), getattr(again, part.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one is other


def test_the_worth_of_a_verdict_is_counted() -> None:
    scores = torch.tensor([5.0, 1, 4, 0, 2, 3, 0, 0, 0, 0], dtype=torch.float64)
    poison = Poison(torch.tensor([0, 4]), torch.zeros(2, 1, 1, 1, dtype=torch.uint8))
    found = quality(Verdict(torch.tensor([0, 2]), scores, 7, True, scores), poison, 7)
    counts = {key: (found[key]["hits"], found[key]["total"]) for key in found if "remo" in key}
    assert counts == {"removed": (2, 10), "poison_removed": (1, 2), "clean_removed": (1, 8)}
    assert found["auroc"] == 14 / 16  # of the pairs: all 8 of the first, 6 of the second
    assert found["tpr"] == 0.5
    assert (found["suspected_target"], found["target_found"]) == (7, True)
    other = quality(Verdict(torch.tensor([0]), scores, 6, False, scores), poison, 7)
    assert (other["target_found"], other["calibrated"]) == (False, False)
