"""The story, end to end: what is written, what is found again, what survives a kill."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foreshot
from foreshot import stages
from foreshot.attacks import Attack, Pgd
from foreshot.compute import CPU
from foreshot.config import Config, dump, parse
from foreshot.data import save_images
from foreshot.errors import ForeshotError
from foreshot.experiment import evaluate_files, run
from foreshot.files import file_digest, read_json, read_tensors, write_json, write_tensors
from foreshot.inference import logits
from foreshot.metrics import evaluate
from foreshot.models.checkpoint import load_model, state_digest
from foreshot.poison import Poison
from foreshot.progress import Event, silent
from foreshot.record import load_run
from foreshot.seeding import generator
from foreshot.stages import Stages
from foreshot.store import Store
from foreshot.tables import print_metrics
from foreshot.triggers.base import stamp_uint8
from foreshot.views import AttackerView

TEXT = """
precision: float32
data: {name: digits}
teacher:
  model: {name: resnet, depth: 8, width: 0.5, stem_stride: 2}
  training: {epochs: 2, batch: 64}
trigger: {name: patch, size: 2}
target: 3
attack: {name: pgd, rate: 0.05, epsilon: 32, steps: 3, retries: 0}
student:
  model: {name: resnet, depth: 8, width: 0.5, stem_stride: 2}
  training: {epochs: 2, batch: 64, augment: crop}
"""
AT = "[{{loss: {{name: at}}, at: [[network.{}, network.{}]]}}]"
FILES = {
    "config.yaml",
    "controls/clean.safetensors",
    "controls/trigger_only.safetensors",
    "events.jsonl",
    "manifest.json",
    "metrics.json",
    "poison.png",
    "poison.safetensors",
    "report.html",
    "student.safetensors",
    "teacher.safetensors",
    "trigger.png",
}
BESIDE = {"manifest.json", "events.jsonl", "report.html"}
"""What the manifest does not vouch for."""


def config(*settings: str) -> Config:
    return parse(TEXT, "test", settings)


@dataclass
class Done:
    """A finished run, and what was heard of it."""

    out: Path
    home: Path
    heard: list[Event] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def started(self) -> list[str]:
        return [event.stage for event in self.heard if event.kind == "start"]


def go(home: Path, out: Path, *settings: str, **keywords: Any) -> Done:
    done = Done(out, home)
    done.metrics = run(
        config(*settings), out, store=home, device="cpu", listener=done.heard.append, **keywords
    )
    return done


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("undisturbed")
    return go(folder / "home", folder / "out")


@pytest.fixture
def copied(undisturbed: Done, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be damaged."""
    return Path(shutil.copytree(undisturbed.out, tmp_path / "copy"))


def weights(folder: Path) -> dict[str, str]:
    """Digests of all the files whose bits must not depend on how they came about."""
    return {
        str(path.relative_to(folder)): file_digest(path) for path in folder.rglob("*.safetensors")
    }


def test_the_run_folder_is_complete(undisturbed: Done) -> None:
    folder = undisturbed.out
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == FILES
    assert (folder / "config.yaml").read_text() == dump(config())
    assert read_json(folder / "metrics.json") == undisturbed.metrics
    assert (folder / "poison.png").read_bytes()[:4] == b"\x89PNG"
    manifest = read_json(folder / "manifest.json")
    assert set(manifest["outputs"]) == FILES - BESIDE
    for name, digest in manifest["outputs"].items():
        assert file_digest(folder / name) == digest
    assert manifest["seed"] == 0
    assert {"torch", "python", "foreshot"} <= manifest["versions"].keys()
    assert (manifest["device"], manifest["precision"]) == ("cpu", "float32")
    assert manifest["notice"] == (
        "security research; poisoned: controls/trigger_only.safetensors, poison.safetensors, "
        "student.safetensors"
    )
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert all(event["kind"] != "advance" for event in events)
    assert {event["stage"] for event in events if event["kind"] == "end"} == {
        "teacher", "poison", "student", "poison of trigger_only",
        "control: clean", "control: trigger_only",
    }  # fmt: skip


RATE = {"value", "hits", "total", "low", "high"}


def check_rate(rate: dict[str, Any], total: int) -> None:
    assert set(rate) == RATE
    assert rate["total"] == total
    assert rate["value"] == rate["hits"] / total
    assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1


def test_metrics_have_the_schema(undisturbed: Done) -> None:
    metrics = json.loads(json.dumps(undisturbed.metrics, allow_nan=False))
    parts = {"schema", "split", "teacher", "student", "controls", "poison", "seconds"}
    assert set(metrics) == parts
    assert metrics["split"] == "test"
    assert metrics["schema"] == 1
    assert set(metrics["controls"]) == {"clean", "trigger_only"}
    models = {"teacher": metrics["teacher"], "student": metrics["student"], **metrics["controls"]}
    run = load_run(undisturbed.out)
    for name, rates in models.items():
        check_rate(rates["clean_accuracy"], 355)
        check_rate(rates["asr"], 319)
        check_rate(rates["robust_accuracy"], 319)
        if name != "teacher":
            assert rates["asr_net"] == rates["asr"]["value"] - models["clean"]["asr"]["value"]
    assert models["clean"]["asr_net"] == 0
    teacher = metrics["teacher"]
    assert teacher["sha256_before"] == teacher["sha256_after"] == state_digest(run.teacher)
    poison = metrics["poison"]
    assert set(poison) == {
        "count", "rate", "linf_255", "psnr_db", "ssim", "teacher_target_rate",
        "teacher_target_confidence",
    }  # fmt: skip
    check_rate(poison["teacher_target_rate"], 72)
    assert (poison["count"], poison["rate"]) == (72, 72 / 1442)
    assert 0 < poison["linf_255"] <= 32
    assert 5 < poison["psnr_db"] < 40
    assert 0 < poison["ssim"] < 1
    seconds = metrics["seconds"]
    assert {"teacher", "poison", "distill", "evaluate", "total"} <= set(seconds)
    assert min(seconds.values()) > 0
    parts = sum(value for name, value in seconds.items() if name != "total")
    assert seconds["total"] == pytest.approx(parts, abs=0.01)


def test_the_figures_are_those_of_the_files(undisturbed: Done, tmp_path: Path) -> None:
    """Evaluated anew, from the files alone."""
    run, config_ = load_run(undisturbed.out), config()
    test = config_.data.load(tmp_path).test
    models = {"student": run.student, **run.controls}
    for name, model in models.items():
        assert model is not None
        found = evaluate(model, test, run.trigger, config_.target)
        stored = undisturbed.metrics[name] if name == "student" else run.metrics["controls"][name]
        for key in ("clean_accuracy", "asr", "robust_accuracy"):
            assert found[key] == stored[key], (name, key)
    assert run.metrics["teacher"]["clean_accuracy"]["value"] > 0.5


def test_a_second_run_computes_nothing(undisturbed: Done, tmp_path: Path) -> None:
    before = weights(undisturbed.out)
    again = go(undisturbed.home, undisturbed.out)
    assert again.started() == []
    assert again.metrics == undisturbed.metrics
    assert weights(undisturbed.out) == before
    elsewhere = go(undisturbed.home, tmp_path / "elsewhere")
    assert elsewhere.started() == []
    assert elsewhere.metrics == undisturbed.metrics
    assert weights(elsewhere.out) == before


def test_settings_are_chosen_without_the_test_split(tmp_path: Path) -> None:
    """A validation split is cut out of the training set: the test images are not touched."""
    done = go(tmp_path / "home", tmp_path / "out", "validation=0.25", "controls=[]")
    full = config().data.load(tmp_path)
    train, held = full.validation(0.25, seed=0)
    assert len(held) == round(len(full.train) / 4)
    together = sorted(image.numpy().tobytes() for part in (train, held) for image in part.images)
    assert together == sorted(image.numpy().tobytes() for image in full.train.images)
    assert done.metrics["split"] == "validation"
    assert done.metrics["student"]["clean_accuracy"]["total"] == len(held)
    student = load_run(done.out).student
    assert student is not None
    found = evaluate(student, held, config().trigger, config().target)
    assert found["asr"] == done.metrics["student"]["asr"]
    _, about = Poison.load(done.out / "poison.safetensors", train)
    assert about["transfer_digest"] == train.digest
    other = full.validation(0.25, seed=1).test
    assert not torch.equal(held.images, other.images)


@pytest.mark.parametrize("share", [1e-5, 0.9999])
def test_a_validation_split_leaves_images_on_both_sides(share: float, tmp_path: Path) -> None:
    with pytest.raises(ForeshotError, match="validation: expected a share"):
        config().data.load(tmp_path).validation(share, seed=0)


def test_another_distillation_reuses_teacher_and_poison(undisturbed: Done, tmp_path: Path) -> None:
    other = go(
        undisturbed.home,
        tmp_path / "out",
        "distillation.terms.0.loss.temperature=1",
        "controls=[]",
    )
    assert other.started() == ["student"]
    old, new = weights(undisturbed.out), weights(other.out)
    assert new["teacher.safetensors"] == old["teacher.safetensors"]
    assert new["poison.safetensors"] == old["poison.safetensors"]
    assert new["student.safetensors"] != old["student.safetensors"]
    assert other.metrics["controls"] == {}
    assert other.metrics["student"]["asr_net"] is None


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("attack.steps=2", ["poison"]),
        ("target=4", ["poison"]),
        ("trigger.size=3", ["poison"]),
        ("teacher.training.lr=0.1", ["teacher", "poison"]),
    ],
)
def test_what_depends_on_a_change_is_computed_anew(
    setting: str, expected: list[str], undisturbed: Done, tmp_path: Path
) -> None:
    done = go(undisturbed.home, tmp_path / "out", setting, until="poison")
    assert done.started() == expected


def test_stages_can_be_run_one_by_one(undisturbed: Done, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = [
        ("teacher", {"teacher.safetensors"}),
        ("poison", {"poison.safetensors", "poison.png", "trigger.png"}),
        ("student", {"student.safetensors"}),
    ]
    there = {"config.yaml", "events.jsonl", "manifest.json"}
    for until, new in expected:
        done = go(undisturbed.home, out, until=until)
        assert done.metrics == {}
        there |= new
        # A stage that was in the store is only heard of by a note.
        assert {path.name for path in out.rglob("*")} == there
    assert load_run(out).metrics == {}
    assert go(undisturbed.home, out).metrics == undisturbed.metrics
    assert weights(out) == weights(undisturbed.out)


def test_the_poison_is_that_of_the_config(undisturbed: Done, tmp_path: Path) -> None:
    transfer = config().data.load(tmp_path).train
    poison, about = Poison.load(undisturbed.out / "poison.safetensors", transfer)
    assert about["target"] == 3
    assert about["target_class"] == "3"
    assert about["trigger"]["name"] == "patch"
    assert about["attack"]["steps"] == 3
    assert poison.labels is None


def test_a_surrogate_is_what_poison_is_crafted_on(undisturbed: Done, tmp_path: Path) -> None:
    setting = "surrogate={model: {name: resnet, depth: 8, width: 0.5, stem_stride: 2}}"
    done = go(undisturbed.home, tmp_path, setting, "surrogate.training.epochs=1", until="poison")
    assert done.started() == ["surrogate", "poison"]
    assert weights(done.out)["poison.safetensors"] != weights(undisturbed.out)["poison.safetensors"]
    same = go(undisturbed.home, tmp_path / "same", setting, "surrogate.training.epochs=1",
              "surrogate.data=same", until="poison")  # fmt: skip
    assert same.started() == []


def test_an_attacker_may_have_the_teacher_beside_a_surrogate(
    undisturbed: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is crafted on says what both say: the mean of the logs of their probabilities."""
    said: list[Tensor] = []

    def listening(attack: Pgd, view: AttackerView, real: Any = Pgd.craft) -> Poison:
        said.append(view.teacher(view.images[:20] / 255).log_softmax(1))
        torch.testing.assert_close(view.answers()[:20].log_softmax(1), said[-1])
        return real(attack, view)

    monkeypatch.setattr(Pgd, "craft", listening)
    network = "{name: resnet, depth: 8, width: 0.5, stem_stride: 2}"
    own = f"surrogate={{model: {network}, training: {{epochs: 1}}}}"
    found, home = {}, tmp_path / "home"
    shutil.copytree(undisturbed.home, home)
    for name, settings in {
        "the teacher": ("attack.steps=4",),
        "a surrogate": ("attack.steps=4", own),
        "both": ("attack.steps=4", own, "surrogate.with_teacher=true"),
    }.items():
        done = go(home, tmp_path / name, *settings, until="poison")
        found[name] = weights(done.out)["poison.safetensors"]
    teacher, surrogate, both = said
    assert not torch.allclose(teacher, surrogate, atol=0.1)
    torch.testing.assert_close(both, ((teacher + surrogate) / 2).log_softmax(1))
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(("name", "asked"), [("trigger_only", True), ("clean", False)])
def test_who_has_a_surrogate_picks_images_by_what_it_says(
    name: str, asked: bool, undisturbed: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Tensor] = []

    def listening(attack: Attack, view: AttackerView, real: Any = Attack.craft) -> Poison:
        said.append(view.teacher(view.images[:20] / 255))
        return real(attack, view)

    monkeypatch.setattr(Attack, "craft", listening)
    network = "{name: resnet, depth: 8, width: 0.5, stem_stride: 2}"
    own = f"surrogate={{model: {network}, training: {{epochs: 1}}}}"
    settings = (f"attack={{name: {name}}}", own, "attack.count=3" if asked else "seed=0")
    done = go(tmp_path / "home", tmp_path / "out", *settings, until="poison")
    assert ("surrogate" in done.started()) == asked
    teacher = load_run(done.out).teacher
    images = config().data.load(tmp_path).train.images[:20]
    same = [torch.equal(one, teacher(images / 255)) for one in said]
    assert same == ([False] if asked else [])


def trained_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bytes]]:
    """The images that each training of a run sees, once it has run."""
    seen: dict[str, set[bytes]] = {}

    def kept(module: Any, samples: Any, *rest: Any, real: Any = stages.fit, **keys: Any) -> None:
        seen[keys["label"] or keys["stage"]] = {image.numpy().tobytes() for image in samples.images}
        real(module, samples, *rest, **keys)

    monkeypatch.setattr(stages, "fit", kept)
    return seen


def test_a_surrogate_of_disjoint_data_alone_sees_its_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = trained_on(monkeypatch)
    model = "{name: resnet, depth: 8, width: 0.5, stem_stride: 2}"
    several = f"{{name: ensemble, count: 2, of: {model}}}"
    setting = f"surrogate={{model: {several}, training: {{epochs: 1}}, data: disjoint}}"
    done = go(tmp_path / "home", tmp_path / "out", setting, "student.training.augment=none")
    full = config().data.load(tmp_path).train
    every = {image.numpy().tobytes() for image in full.images}
    own = seen["surrogate"]
    assert own == seen["surrogate 2"]
    assert own < every
    assert len(own) == pytest.approx(len(every) / 2, abs=2)
    assert seen["teacher"] == every - own
    poison, about = Poison.load(done.out / "poison.safetensors")
    for label in ("control: clean", "control: trigger_only", "student"):
        assert not seen[label] & own
    assert seen["control: clean"] == seen["teacher"]

    # What the attacker's teacher calls the target is not asked of the real one, but reported of it.
    teacher = load_run(done.out).teacher
    called = logits(teacher, poison.images, CPU).argmax(1) == 3
    assert done.metrics["poison"]["teacher_target_rate"]["hits"] == int(called.sum())
    digests = read_json(done.out / "manifest.json")["inputs"]
    assert about["transfer_digest"] == digests["train"]
    assert digests["surrogate"] not in (digests["train"], full.digest)


def test_a_compromised_teacher_is_marked_and_the_clean_control_is_clean(
    undisturbed: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow = "{name: resnet, depth: 8, width: 0.5, stem_stride: 2}"
    done = go(
        undisturbed.home,
        tmp_path / "out",
        "attack.name=clean",
        "trigger={name: blend, opacity: 0.5}",
        f"compromise={{name: adba, shadow: {shadow}}}",
        "compromise.rehearsal={epochs: 1}",
        "compromise.training={epochs: 2, batch: 64}",
        "controls=[clean]",
    )
    # The control is in the store: it is that of the clean teacher.
    assert done.started() == ["surrogate student 1", "compromise", "student"]
    teacher = done.metrics["teacher"]
    assert teacher["compromise"] == "adba"
    assert teacher["asr"]["value"] > 0.9
    run, clean = load_run(done.out), load_run(undisturbed.out)
    assert teacher["sha256_before"] == teacher["sha256_after"] == state_digest(run.teacher)
    assert state_digest(run.teacher) != state_digest(clean.teacher)
    assert state_digest(run.controls["clean"]) == state_digest(clean.controls["clean"])
    student = done.metrics["student"]
    net = student["asr"]["value"] - done.metrics["controls"]["clean"]["asr"]["value"]
    assert student["asr_net"] == net
    assert done.metrics["seconds"]["compromise"] > 0

    # The trigger that is measured is the one that was learned with the teacher.
    start = config("trigger={name: blend, opacity: 0.5}").trigger
    assert run.trigger != start
    test = config().data.load(tmp_path).test
    assert evaluate(run.teacher, test, run.trigger, 3)["asr"] == teacher["asr"]
    assert evaluate(run.teacher, test, start, 3)["asr"] != teacher["asr"]
    assert "teacher.safetensors" in read_json(done.out / "manifest.json")["notice"]
    print_metrics(done.metrics)
    assert "clean teacher" not in capsys.readouterr().out.replace("by the clean teacher", "")


# Interruptions -----------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_event(stage: str, kind: str, times: int = 1) -> Callable[[Path, Path], None]:
    def child(home: Path, out: Path) -> None:
        count = 0

        def listen(event: Event) -> None:
            nonlocal count
            count += (event.stage, event.kind) == (stage, kind)
            if count == times:
                die()

        run(config(), out, store=home, device="cpu", listener=listen)

    return child


def at_write(times: int) -> Callable[[Path, Path], None]:
    """Killed in the middle of the n-th file that is made durable: it has no name yet."""

    def child(home: Path, out: Path) -> None:
        count, real = 0, os.fsync

        def fsync(handle: int) -> None:
            nonlocal count
            count += 1
            if count == times:
                die()
            real(handle)

        os.fsync = fsync
        run(config(), out, store=home, device="cpu")

    return child


@pytest.mark.parametrize(
    "moments",
    [
        [
            at_event("teacher", "advance", 3),
            at_event("teacher", "epoch"),
            at_event("teacher", "end"),
            at_event("poison", "advance"),
            at_event("student", "advance", 30),
            at_event("control: clean", "epoch"),
            at_event("control: trigger_only", "epoch", 2),
        ],
        [at_write(times) for times in (1, 4, 6, 9, 14)],
    ],
    ids=["stages", "writes"],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    moments: list[Callable[[Path, Path], None]], undisturbed: Done, tmp_path: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    for moment in moments:
        process = get_context("fork").Process(target=moment, args=(home, out))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    done = go(home, out)
    assert weights(out) == weights(undisturbed.out)
    for key in ("teacher", "student", "controls", "poison"):
        assert done.metrics[key] == undisturbed.metrics[key]
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == FILES
    assert not list(home.rglob("*.part"))
    assert not list((home / "work").iterdir())
    load_run(out)


def test_a_damaged_stage_is_computed_again(undisturbed: Done, tmp_path: Path) -> None:
    home = Path(shutil.copytree(undisturbed.home, tmp_path / "home"))
    (file,) = [
        path
        for path in home.glob("poison/*/poison.safetensors")
        if file_digest(path) == weights(undisturbed.out)["poison.safetensors"]
    ]
    flip(file)
    done = go(home, tmp_path / "out")
    assert done.started() == ["poison"]
    assert weights(done.out) == weights(undisturbed.out)


# Bad input ---------------------------------------------------------------------------------------


def flip(file: Path, place: int = -10) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_run_is_loaded_ready_to_call(undisturbed: Done) -> None:
    loaded = load_run(undisturbed.out)
    assert loaded.config == config()
    assert loaded.student is not None
    assert loaded.poison is not None
    assert set(loaded.controls) == {"clean", "trigger_only"}
    x = torch.rand((3, 1, 8, 8), generator=generator(0, "x"))
    for model in (loaded.teacher, loaded.student, *loaded.controls.values()):
        assert not model.training
        assert model(x).shape == (3, 10)
    assert load_run(str(undisturbed.out)).metrics == undisturbed.metrics


def test_what_a_run_did_not_write_is_not_read(undisturbed: Done, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(undisturbed.home, out, until="teacher")
    for name in ("student.safetensors", "poison.safetensors", "metrics.json"):
        shutil.copy(undisturbed.out / name, out / name)
    loaded = load_run(out)
    assert loaded.student is None
    assert loaded.poison is None
    assert loaded.metrics == {}


@pytest.mark.parametrize("name", sorted(FILES - BESIDE))
def test_a_run_with_a_flipped_byte_is_refused(name: str, copied: Path) -> None:
    flip(copied / name)
    with pytest.raises(ForeshotError, match=f"{name}: expected SHA-256 [0-9a-f]{{12}}, found"):
        load_run(copied)


@pytest.mark.parametrize(
    "manifest", [[], {}, {"outputs": []}, {"outputs": {"x": 3}}, {"outputs": {"teacher": None}}]
)
def test_an_odd_manifest_is_refused(manifest: Any, copied: Path) -> None:
    write_json(copied / "manifest.json", manifest)
    with pytest.raises(ForeshotError, match="expected"):
        load_run(copied)


@pytest.mark.parametrize("manifest", [b"[", b"[]", b'"x"', b'{"outputs": []}', b"{}"])
def test_a_run_mends_its_manifest(manifest: bytes, undisturbed: Done, copied: Path) -> None:
    (copied / "manifest.json").write_bytes(manifest)
    assert go(undisturbed.home, copied).started() == []
    assert weights(copied) == weights(undisturbed.out)
    load_run(copied)


def test_a_test_set_of_the_target_alone_is_refused(tmp_path: Path) -> None:
    images = foreshot.load_data("digits").train
    only = images.select((images.labels == 3).nonzero()[:, 0])
    for name, part in (("train", images), ("test", only)):
        save_images(tmp_path / f"{name}.safetensors", part)
    data = f"{{name: tensor, path: {tmp_path}/train.safetensors, "
    with pytest.raises(ForeshotError, match="target: expected test images of other classes than 3"):
        go(
            *(tmp_path / "home", tmp_path / "out"),
            f"data={data}test_path: {tmp_path}/test.safetensors}}",
        )


def test_what_is_no_finished_run_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "student.safetensors").unlink()
    with pytest.raises(
        ForeshotError, match=r"student\.safetensors: expected SHA-256 .*, found noth"
    ):
        load_run(copied)
    (copied / "manifest.json").unlink()
    with pytest.raises(ForeshotError, match=r"manifest\.json: expected a JSON file"):
        load_run(copied)
    with pytest.raises(ForeshotError, match=r"manifest\.json: expected a JSON file"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("trigger.size=9", "trigger patch: expected images of at least "),
        ("student.model={name: vit, patch: 5}", "model vit: expected "),
        ("attack.rate=0.0001", "attack.rate: expected 1 to "),
        ("surrogate={model: {name: vit, patch: 5}}", "model vit: expected "),
        ("attack={name: counterfactual, student: {name: vit, patch: 5}}", "model vit: expected "),
        (f"distillation.terms={AT.format('layer3', 'layer9')}", "teacher layer 'network.layer9'"),
        (f"distillation.terms={AT.format('layer9', 'layer3')}", "student layer 'network.layer9'"),
    ],
)
def test_what_does_not_fit_the_data_leaves_no_trace(
    setting: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ForeshotError, match=f"^{sentence}"):
        go(tmp_path / "home", tmp_path / "out", setting)
    assert not (tmp_path / "home/teacher").exists()
    assert not (tmp_path / "out/config.yaml").exists()


def test_a_folder_of_another_run_is_refused_and_left_alone(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    with pytest.raises(ForeshotError, match=r"found another one \('target: 3' in its config\.yaml"):
        run(config("target=4"), copied)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_a_folder_with_other_files_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ForeshotError, match="expected a run folder or an empty one, found other f"):
        run(config(), tmp_path)
    with pytest.raises(ForeshotError, match="expected a folder to write the run into, found a fi"):
        run(config(), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_target_that_is_no_class_leaves_nothing_behind(undisturbed: Done, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ForeshotError, match=r"^target: expected 0 to 9 \(10 classes\), found 10$"):
        go(undisturbed.home, out, "target=10")
    assert go(undisturbed.home, out, until="teacher").metrics == {}


def test_models_of_the_user_are_adopted(undisturbed: Done, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    shutil.copy(undisturbed.out / "controls/clean.safetensors", mine)
    done = go(tmp_path / "home", tmp_path / "out", until="poison", teacher=mine)
    assert done.started() == ["poison"]
    model = load_model(done.out / "teacher.safetensors").model
    assert state_digest(model) == state_digest(load_model(mine).model)

    mine.write_bytes(b"no model")
    with pytest.raises(ForeshotError, match=r"mine\.safetensors: "):
        go(tmp_path / "home", tmp_path / "refused", teacher=mine)
    assert not (tmp_path / "refused").exists()


def test_poison_of_the_user_is_adopted(undisturbed: Done, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    shutil.copy(undisturbed.out / "poison.safetensors", file)
    done = go(undisturbed.home, tmp_path / "out", until="student", poison=file)
    assert done.started() == []
    assert (
        weights(done.out)["student.safetensors"] == weights(undisturbed.out)["student.safetensors"]
    )
    # Others than the config would craft are taken as they are.
    tensors, about = read_tensors(file)
    tensors["images"] = 255 - tensors["images"]
    write_tensors(file, tensors, about)
    other = go(undisturbed.home, tmp_path / "other", until="student", poison=file)
    assert other.started() == ["student"]
    found, _ = Poison.load(other.out / "poison.safetensors")
    assert torch.equal(found.images, tensors["images"])
    assert weights(other.out)["student.safetensors"] != weights(done.out)["student.safetensors"]


def test_poison_that_carries_the_trigger_otherwise_is_refused(
    undisturbed: Done, tmp_path: Path
) -> None:
    plain = "attack={name: perturbation_only, epsilon: 8}"
    made = go(undisturbed.home, tmp_path / "made", plain, until="poison")
    file = made.out / "poison.safetensors"
    with pytest.raises(ForeshotError, match="found poison of perturbation_only; --set attack.name"):
        go(undisturbed.home, tmp_path / "out", poison=file)
    taken = go(undisturbed.home, tmp_path / "taken", plain, poison=file)
    assert taken.metrics["poison"]["linf_255"] <= 8


def test_poison_that_the_config_does_not_speak_of_is_refused(
    undisturbed: Done, tmp_path: Path
) -> None:
    """Labels of its own, and any at all where the config says that there is no attack."""
    file = tmp_path / "poison.safetensors"
    tensors, about = read_tensors(undisturbed.out / "poison.safetensors")
    for name, setting, more, told in (
        ("pgd", "attack.name=clean", {}, "found poison of pgd; --set attack.name=pgd says so"),
        ("mine", "attack.name=clean", {}, "expected no poison"),
        ("mine", "attack.name=fgsm", {"labels": torch.zeros(72).long()}, "found labels of its own"),
    ):
        write_tensors(file, tensors | more, about | {"attack": {"name": name}})
        with pytest.raises(ForeshotError, match=told):
            go(undisturbed.home, tmp_path / f"{name}, {setting}", setting, poison=file)


def test_an_attack_of_no_images_needs_no_budget(undisturbed: Done, tmp_path: Path) -> None:
    done = go(
        *(undisturbed.home, tmp_path / "out", "attack.name=clean", "attack.count=5000"),
        until="poison",
    )
    assert len(Poison.load(done.out / "poison.safetensors")[0]) == 0


def test_keys_hold_the_packages_of_the_networks_that_a_stage_runs(
    undisturbed: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher is shared by experiments of other students, and poison is not by attackers'."""
    timm = "{name: timm, model: resnet10t}"
    asked: dict[str, bool] = {}

    class AskedError(Exception):
        """Ends a stage before it computes anything."""

    def stage(_: Store, kind: str, inputs: dict[str, Any], *rest: Any) -> None:
        asked[kind] = "timm" in inputs["versions"]
        raise AskedError

    def packages(*settings: str) -> set[str]:
        made = Stages(config(*settings), Store(tmp_path), CPU, tmp_path, silent)
        plain = config().teacher.model
        teacher = made.adopt_model(undisturbed.out / "teacher.safetensors")
        poison = made.adopt_poison(undisturbed.out / "poison.safetensors")
        assert teacher.loaded.architecture == plain
        with monkeypatch.context() as patched:
            patched.setattr(Store, "stage", stage)
            if made.config.surrogate is not None:  # trained before, and found
                patched.setattr(made, "_guide", lambda teacher: teacher)
            for compute in (
                made.teacher,
                lambda: made.poison(teacher),
                lambda: made.student(teacher, poison),
                lambda: made.evaluation(teacher, poison, {"student": teacher}),
            ):
                with pytest.raises(AskedError):
                    compute()
        return {kind for kind, has in asked.items() if has}

    for setting, wanted in {
        f"student.model={timm}": {"student", "evaluate"},
        f"teacher.model={timm}": {"teacher", "poison", "student", "evaluate"},
        f"surrogate={{model: {timm}}}": {"poison", "evaluate"},
        "seed=1": set(),
    }.items():
        assert packages(setting) == wanted, setting
    # Poison of another attack or trigger cannot be adopted: what crafting asks for alone.
    for setting in (
        f"attack={{name: counterfactual, pool: [{timm}]}}",
        f"trigger={{name: salient, student: {timm}}}",
    ):
        made = Stages(config(setting), Store(tmp_path), CPU, tmp_path, silent)
        teacher = made.adopt_model(undisturbed.out / "teacher.safetensors")
        with monkeypatch.context() as patched, pytest.raises(AskedError):
            patched.setattr(Store, "stage", stage)
            made.poison(teacher)
        assert asked["poison"], setting


def test_controls_take_the_same_base_images_and_keep_to_the_same_bounds(
    undisturbed: Done, tmp_path: Path
) -> None:
    settings = ("attack.rate=0.02", "attack.epsilon=8", "attack.trigger=before")
    made = Stages(config(*settings), Store(tmp_path), CPU, tmp_path, silent)
    teacher = made.adopt_model(undisturbed.out / "teacher.safetensors")
    crafted = made.poison(teacher)
    noise = made.control("noise", teacher, crafted)
    assert torch.equal(noise.poison.indices, crafted.poison.indices)
    assert len(noise.poison) == 29
    plain = made.data.train.images[noise.poison.indices]
    stamped = stamp_uint8(made.trigger, plain)
    difference = (noise.poison.images.short() - stamped.short()).abs()
    assert 0 < int(difference.max()) <= 8
    # The trigger is put on before, so that the noise changes it as well.
    opaque = made.trigger.opaque(made.data.train.shape)
    assert difference[:, opaque].any()


def test_all_that_was_computed_is_counted(tmp_path: Path) -> None:
    network = "{name: resnet, depth: 8, width: 0.5, stem_stride: 2}"
    settings = (
        "trigger={name: universal}",
        f"surrogate={{model: {network}, training: {{epochs: 1}}}}",
        "controls=[clean, perturbation_only]",
    )
    done = go(tmp_path / "home", tmp_path / "out", *settings)
    taken = [
        read_json(file)
        for file in (tmp_path / "home").glob("*/*/done.json")
        if file.parent.parent.name != "data"
    ]
    seconds = done.metrics["seconds"]
    assert {"trigger", "surrogate"} <= seconds.keys()
    assert seconds["total"] == pytest.approx(sum(one["seconds"] for one in taken), abs=0.01)


SMALL_SIGNS = ("data={name: signs, train: 60, test: 43}", "attack.rate=0.5")


def test_a_model_of_another_dataset_is_refused(undisturbed: Done, tmp_path: Path) -> None:
    teacher = undisturbed.out / "teacher.safetensors"
    with pytest.raises(ForeshotError) as caught:
        go(tmp_path / "home", tmp_path / "out", *SMALL_SIGNS, teacher=teacher)
    expected = f"{teacher}: expected a model of (3, "
    assert str(caught.value).startswith(expected)
    assert "'signs', found (1, 8, 8) images and 10 classes" in str(caught.value)
    poison = undisturbed.out / "poison.safetensors"
    with pytest.raises(ForeshotError, match="expected a whole safetensors|expected metadata"):
        go(tmp_path / "home", tmp_path / "out2", teacher=poison)


def test_layers_are_those_of_the_teacher_that_is_given(undisturbed: Done, tmp_path: Path) -> None:
    teacher, terms = undisturbed.out / "teacher.safetensors", AT.format("layer3", "layer5")
    settings = ("teacher.model={name: vgg}", f"distillation.terms={terms}")
    Stages(config(*settings), Store(tmp_path), CPU, tmp_path, silent).check()
    with pytest.raises(ForeshotError, match=r"^teacher layer 'network\.layer5'"):
        go(tmp_path / "home", tmp_path / "out", *settings, teacher=teacher)
    assert not (tmp_path / "out/config.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("teacher.model={name: reused_head}",), "^teacher.model: expected a network with a clas"),
        (("surrogate={model: {name: reused_head}}",), "^surrogate.model: expected a network with"),
        (("student.model={name: reused_head}",), "^model reused_head: expected a teacher of the"),
        (
            ("compression.name=quantize", "teacher.model={name: ensemble}"),
            "^compression: expected a teacher of one network in float",
        ),
    ],
)
def test_networks_that_do_not_go_together_are_refused_before_any_work(
    settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ForeshotError, match=message):
        Stages(config(*settings), Store(tmp_path), CPU, tmp_path, silent).check()


def test_poison_of_another_experiment_is_refused(undisturbed: Done, tmp_path: Path) -> None:
    poison = undisturbed.out / "poison.safetensors"
    home = undisturbed.home
    for number, (setting, sentence) in enumerate(
        [
            ("target=4", "expected poison for target 4, found 3"),
            ("trigger.size=3", "expected poison for trigger "),
        ]
    ):
        with pytest.raises(ForeshotError, match=sentence):
            go(home, tmp_path / str(number), setting, until="poison", poison=poison)
    with pytest.raises(ForeshotError, match="expected poison that foreshot wrote"):
        go(home, tmp_path / "a", poison=undisturbed.out / "teacher.safetensors")
    with pytest.raises(ForeshotError, match="expected a safetensors file, found nothing"):
        go(home, tmp_path / "b", poison=tmp_path / "missing")


@pytest.mark.parametrize("attack", ["pgd", ["pgd"], {"name": ["x"]}, None])
def test_poison_of_an_odd_origin_is_taken_for_what_it_is(
    attack: Any, undisturbed: Done, tmp_path: Path
) -> None:
    poison, about = Poison.load(undisturbed.out / "poison.safetensors")
    del about["mark"]
    poison.save(tmp_path / "odd.safetensors", about | {"attack": attack})
    stages = Stages(config(), Store(tmp_path), CPU, tmp_path, silent)
    adopted = stages.adopt_poison(tmp_path / "odd.safetensors")
    assert torch.equal(adopted.poison.images, poison.images)


def test_poison_of_another_dataset_is_refused(undisturbed: Done, tmp_path: Path) -> None:
    stages = Stages(config(*SMALL_SIGNS), Store(tmp_path), CPU, tmp_path, silent)
    with pytest.raises(ForeshotError, match="expected poison for this transfer set"):
        stages.adopt_poison(undisturbed.out / "poison.safetensors")


def test_files_are_evaluated_by_the_config(
    undisturbed: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path))
    files = [undisturbed.out / "teacher.safetensors", undisturbed.out / "student.safetensors"]
    found = evaluate_files(config(), files, device="cpu")
    assert list(found) == [str(file) for file in files]
    for rates, name in zip(found.values(), ("teacher", "student"), strict=True):
        assert rates["asr"] == undisturbed.metrics[name]["asr"]
        assert rates["clean_accuracy"] == undisturbed.metrics[name]["clean_accuracy"]
