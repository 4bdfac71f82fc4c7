"""`foreshot audit data` on real files, also on those that mean harm."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import ARCHITECTURE, CLASSES, SIDE, Page, Tiny, stripes
from foreshot.attacks import Pgd
from foreshot.audit import report as reports
from foreshot.audit.folder import FILES
from foreshot.audit.job import Job
from foreshot.audit.reading import Wanted, printable, read_set
from foreshot.cli import main
from foreshot.cli.audits import audit_data
from foreshot.compute import CPU
from foreshot.data import ImageSet, save_images
from foreshot.data.tensor import read
from foreshot.defences import SCREENS
from foreshot.defences.conformal import DROP
from foreshot.defences.screens import NearDuplicate
from foreshot.errors import ForeshotError
from foreshot.files import read_json, read_tensors
from foreshot.models.checkpoint import save_model
from foreshot.progress import Event
from foreshot.views import AttackerView

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=document.title='again'>"


def put(images: ImageSet, folder: Path) -> Path:
    assert images.labels is not None
    for index, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        path = folder / images.classes[int(label)] / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


@dataclass(frozen=True)
class Files:
    """Folders of pictures, the teacher's file, and names of the poison."""

    ok: Path
    bad: Path
    trusted: Path
    teacher: Path
    poison: set[str]


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("files")
    view = AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, tiny.target, 0, CPU)
    poison = Pgd(count=40, epsilon=30, steps=20, retries=1).craft(view)
    save_model(root / "t.safetensors", tiny.teacher, ARCHITECTURE, (1, SIDE, SIDE), CLASSES)
    return Files(
        put(stripes(160, 7), root / "ok"),
        put(poison.apply(tiny.train), root / "bad"),
        put(stripes(600, 5), root / "trusted"),
        root / "t.safetensors",
        {f"{CLASSES[i % 4]}/{i:04}.png" for i in poison.indices.tolist()},
    )


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def audit_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `foreshot audit data` in this process, in an empty folder, with a store of its own."""
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Ended:
        words = ["foreshot", "audit", "data", *map(str, arguments), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Ended(int(end.value.code or 0), captured.out, captured.err)

    return call


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ranked.jsonl").read_text().splitlines()]


def one_line(text: str) -> str:
    return " ".join(text.split())


# Verdicts ----------------------------------------------------------------------------------------


def test_poison_is_exit_code_1_and_a_clean_set_is_0(audit_, files: Files) -> None:
    common = ("--teacher", files.teacher, "--clean", files.trusted)
    bad = audit_(files.bad, *common, "--write-clean", "kept")
    assert (bad.code, bad.err) == (1, "")
    text = one_line(bad.out)
    assert "SUSPICIOUS: the set differs from this clean set" in text
    assert "Of sets without poison, at most 5% are called suspicious" in text
    assert "Suspected target: vertical" in text
    verdict = read_json(Path("audits/bad/verdict.json"))
    assert (verdict["verdict"], verdict["suspected_target"]) == ("suspicious", "vertical")
    assert verdict["p"] <= verdict["alarm"] == 0.05
    assert verdict["images_per_second"].keys() == {
        "teacher", "consistency", "frequency", "detector", "near_duplicate",
    }  # fmt: skip
    for name, speed in verdict["images_per_second"].items():
        printed = re.search(rf"{name} *│ *([\d,]+) ", bad.out)
        assert printed
        assert abs(int(printed[1].replace(",", "")) - speed) <= 0.6  # rounded, of one rounded value
    for name in ("report.html", "ranked.jsonl"):
        assert name in bad.out
    found = rows(Path("audits/bad"))
    assert "Kept 3" in text
    assert f"of 400 images in kept; left-out.jsonl there lists {verdict['left_out']} " in text
    assert "400 images and 600 clean ones" in text
    page = Path("audits/bad/report.html").read_text(encoding="utf-8")
    for shown in (files.bad, files.teacher, files.trusted, "400 images and 600 clean ones"):
        assert f"<td>{shown}</td>" in page
    assert {row["name"] for row in found[:20]} <= files.poison
    assert [row["rank"] for row in found] == list(range(1, 401))
    assert sorted(row["index"] for row in found) == list(range(400))
    assert found[0]["suspected_target"] == "vertical"
    assert {key for key in found[0] if key.startswith("score_")} == {
        "score_consistency", "score_frequency", "score_detector", "score_near_duplicate",
    }  # fmt: skip
    kept = {str(path.relative_to("kept")) for path in Path("kept").rglob("*.png")}
    out = {
        json.loads(line)["name"] for line in Path("kept/left-out.jsonl").read_text().splitlines()
    }
    assert out == {row["name"] for row in found if row["left_out"]}
    assert kept | out == {row["name"] for row in found}
    assert not kept & out
    assert len(files.poison & out) > 0.8 * len(files.poison)
    for name in kept:
        assert (Path("kept") / name).read_bytes() == (files.bad / name).read_bytes()

    ok = audit_(files.ok, *common, "--write-clean", "all")
    assert (ok.code, ok.err) == (0, "")
    assert "CLEAN: nothing was found" in ok.out
    assert read_json(Path("audits/ok/verdict.json"))["suspected_target"] is None
    assert len(list(Path("all").rglob("*.png"))) == 160
    assert Path("all/left-out.jsonl").read_text() == ""


def test_what_is_kept_is_a_set_of_pictures_alone(audit_, files: Files) -> None:
    common = ("--teacher", files.teacher, "--screens", "near_duplicate")
    assert audit_(files.ok, *common, "--write-clean", "kept").code == 0
    again = audit_("kept", *common, "--broken", "refuse")
    assert (again.code, again.err) == (0, "")
    assert "not read" not in again.out


@pytest.mark.parametrize("name", [name for name in SCREENS if name != "combined"])
def test_every_screen_can_be_asked_for(files: Files, name: str) -> None:
    bare = Job(files.ok, files.teacher, screens=(name,))
    given = replace(bare, clean=files.trusted, labels=True, second=files.teacher, distil=True)
    assert given._screen(name) == SCREENS[name].model_validate({})
    if SCREENS[name].needs:
        with pytest.raises(ForeshotError, match=f"screen {name}: expected "):
            bare._screen(name)


def test_a_student_is_distilled_where_that_is_asked_for(audit_, files: Files) -> None:
    common = ("--teacher", files.teacher, "--clean", files.trusted, "--distil")
    assert audit_(files.bad, *common).code == 1
    speeds = read_json(Path("audits/bad/verdict.json"))["images_per_second"]
    assert list(speeds)[:2] == ["teacher", "student"]
    assert "scan" in speeds
    assert read_json(Path("audits/bad/verdict.json"))["distilled"] is True
    by_scan = sorted(rows(Path("audits/bad")), key=lambda row: -row["score_scan"])
    assert sum(row["name"] in files.poison for row in by_scan[:40]) > 30
    one = audit_(files.ok, *common, "--screens", "spectral_signature")
    assert (one.code, one.err) == (0, "")
    assert list(read_json(Path("audits/ok/verdict.json"))["images_per_second"]) == [
        "teacher", "student", "spectral_signature",
    ]  # fmt: skip


def test_the_command_line_gives_up_as_many_clean_images_as_python_does() -> None:
    assert inspect.signature(audit_data).parameters["drop"].default == DROP == Job.drop


def test_parquet_holds_the_same_as_json_lines(
    audit_, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arguments = (files.ok, "--teacher", files.teacher, "--screens", "near_duplicate")
    audit_(*arguments)
    assert parquet.read_table("audits/ok/ranked.parquet").to_pylist() == rows(Path("audits/ok"))

    def missing(package: str, extra: str, what: str) -> None:
        raise ForeshotError(f"{what}: expected the package {package} [{extra}]")

    monkeypatch.setattr("foreshot.files.imported", missing)
    ended = audit_(*arguments, "--out", "elsewhere")
    said = "ranked.parquet: expected the package pyarrow [parquet]; ranked.jsonl holds the same."
    assert said in one_line(ended.out)
    assert not Path("elsewhere/ranked.parquet").exists()
    assert rows(Path("elsewhere")) == rows(Path("audits/ok"))


def test_without_clean_images_it_says_that_it_guesses(audit_, files: Files) -> None:
    ended = audit_(files.ok, "--teacher", files.teacher, "--screens", "near_duplicate")
    assert ended.code == 0
    said = "UNCALIBRATED: without clean images to compare with (--clean), how high clean images"
    assert said in one_line(ended.out)
    assert "no rate of false alarms is promised" in one_line(ended.out)
    assert "at most 5%" not in ended.out
    assert read_json(Path("audits/ok/verdict.json"))["calibrated"] is False


def test_a_small_clean_set_is_warned_of(audit_, files: Files, tmp_path: Path) -> None:
    few = put(stripes(8, 3), tmp_path / "few")
    common = (files.ok, "--teacher", files.teacher, "--screens", "near_duplicate", "--clean")
    nothing = audit_(*common, few, "--alarm", "0.001", "--write-clean", "kept")
    assert (nothing.code, nothing.err) == (2, "")
    said = one_line(nothing.out)
    assert "NO VERDICT: so few images cannot tell a poisoned set from a clean one (p = " in said
    assert "WARNING: with 8 clean images and a set of 160, no share of poison can be found." in said
    assert "kept was not written: it could hold poison." in said
    assert not Path("kept").exists()
    assert read_json(Path("audits/ok/verdict.json"))["verdict"] == "none"
    more = one_line(audit_(*common, files.trusted).out)
    smallest = read_json(Path("audits/ok/verdict.json"))["smallest_share"]
    assert 0.01 < smallest < 0.1
    assert "WARNING: with 600 clean images" in more
    assert f"poison is sure to be found from {smallest:.2%} of the set on" in more


def test_a_suspicious_set_that_cannot_be_cleaned_is_warned_of(
    audit_, files: Files, tiny: Tiny, tmp_path: Path
) -> None:
    """Wrong labels in every second image tell; 15 clean images cannot tell which ones they are."""
    assert tiny.train.labels is not None
    labels = tiny.train.labels.clone()
    labels[::2] = (labels[::2] + 1) % 4
    save_images(tmp_path / "set.safetensors", replace(tiny.train, labels=labels))
    few = put(stripes(30, 3), tmp_path / "few")
    common = ("--teacher", files.teacher, "--labels", "--screens", "label_disagreement")
    ended = audit_("set.safetensors", *common, "--clean", few, "--write-clean", "kept")
    assert ended.code == 1
    assert "WARNING: no single image stands out enough to be left out" in one_line(ended.out)
    assert "kept was not written: it could hold poison." in one_line(ended.out)
    assert not Path("kept").exists()


def test_a_guess_takes_as_many_images_as_its_rate_of_alarms(audit_, files: Files, tmp_path) -> None:
    common = ("--teacher", files.teacher, "--screens", "near_duplicate", "--out", "out")
    for count, code in ((19, 2), (20, 0)):
        folder = put(stripes(count, 1), tmp_path / f"of-{count}")
        assert audit_(folder, *common).code == code
    assert audit_(folder, *common, "--alarm", "0.01").code == 2


def test_what_no_audit_has_written_stays(audit_, files: Files, tmp_path: Path) -> None:
    """Neither a file of the user's is removed, nor what is to be read."""
    common = ("--teacher", files.teacher, "--screens", "near_duplicate", "--out", "mine")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.html").write_text("mine")
    refused = audit_(files.ok, *common)
    assert refused.code == 2
    assert "mine: expected a folder for the report, found report.html there, and no audit's" in (
        refused.err
    )
    assert (mine / "report.html").read_text() == "mine"
    (mine / "report.html").unlink()
    assert audit_(files.ok, *common).code == 0
    teacher = mine / "changes.safetensors"
    teacher.write_bytes(files.teacher.read_bytes())
    refused = audit_(files.ok, "--teacher", teacher, *common[2:])
    assert refused.code == 2
    assert "found changes.safetensors there, which is to be read" in refused.err
    assert teacher.exists()
    # One that was killed while it wrote goes on.
    teacher.unlink()
    (mine / "verdict.json").unlink()
    (mine / ".audit").touch()
    assert audit_(files.ok, *common).code == 0
    assert not (mine / ".audit").exists()


def test_a_verdict_of_something_else_does_not_stay(
    audit_, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = put(stripes(20, 1), tmp_path / "elsewhere" / "ok")
    common = ("--teacher", files.teacher, "--screens", "near_duplicate")
    verdict = Path("audits/ok/verdict.json")
    assert audit_(files.ok, *common).code == 0
    assert read_json(verdict)["paths"]["set"] == str(files.ok)
    refused = audit_(other, *common)
    assert refused.code == 2
    assert refused.err == (
        f"foreshot: audits/ok: expected no audit or one of {other}, found one of {files.ok}; "
        "--out names another folder\n"
    )
    assert verdict.exists()
    assert audit_(other, *common, "--out", "audits/ok").code == 0
    assert read_json(verdict)["paths"]["set"] == str(other)
    assert {path.name for path in verdict.parent.iterdir()} <= set(FILES)
    assert audit_(other, *common, "--out", "audits/ok", "--screens", "typo").code == 2
    assert not list(verdict.parent.iterdir())
    assert audit_(other, *common).code == 0  # nobody's any more
    monkeypatch.setattr(NearDuplicate, "suspicion", lambda *_: 1 / 0)
    assert audit_(other, *common, "--seed", "1").code == 2
    assert not list(verdict.parent.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{bro", "[1]", "null", '{"paths": "x"}', '{"paths": {}}', "{}"]
)
def test_a_verdict_that_does_not_say_of_what_is_replaced(text: str, audit_, files: Files) -> None:
    verdict = Path("audits/ok/verdict.json")
    verdict.parent.mkdir(parents=True)
    verdict.write_text(text)
    ended = audit_(files.ok, "--teacher", files.teacher, "--screens", "near_duplicate")
    assert (ended.code, ended.err) == (0, "")
    assert read_json(verdict)["verdict"] == "clean"


def test_two_audits_at_once_do_not_write_over_each_other(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    job = Job(files.ok, files.teacher, screens=("near_duplicate",), device="cpu")
    other = replace(job, source=put(stripes(20, 1), tmp_path / "elsewhere" / "ok"))

    def meanwhile(event: Event) -> None:
        if (event.stage, event.kind) == ("near_duplicate", "start"):
            other.run()

    with pytest.raises(ForeshotError, match="^audits/ok: expected no audit or one of "):
        job.run(meanwhile)
    assert read_json(Path("audits/ok/verdict.json"))["images"] == 20


def test_a_full_disk_is_said_of_what_could_not_be_written(
    audit_, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    common = ("--teacher", files.teacher, "--screens", "near_duplicate")
    ended = audit_(files.ok, *common, "--write-clean", "kept")
    assert ended.code == 2
    assert re.fullmatch(r"foreshot: \S+/\.kept\.\d+\.part/\S+\.png: no space left.*\n", ended.err)
    assert not list(Path().glob("*kept*"))


def test_labels_and_a_file_of_tensors(audit_, files: Files, tiny: Tiny, tmp_path: Path) -> None:
    view = AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, tiny.target, 0, CPU)
    poison = Pgd(count=20, epsilon=30, steps=20, retries=1).craft(view)
    save_images(tmp_path / "set.safetensors", poison.apply(tiny.train))
    arguments = ("set.safetensors", "--teacher", files.teacher, "--clean", files.trusted)
    audit_(*arguments, "--screens", "near_duplicate", "--write-clean", "unlabelled")
    assert torch.equal(read(Path("unlabelled/set.safetensors"))[1], tiny.train.labels)  # pyright: ignore[reportArgumentType]
    ended = audit_(
        *arguments, "--labels", "--screens", "label_disagreement", "--write-clean", "kept"
    )
    assert ended.code == 1
    found = rows(Path("audits/set"))
    assert {int(row["name"]) for row in found[:20]} == set(poison.indices.tolist())
    assert {row["suspected_target"] for row in found[:20]} == {"vertical"}
    kept, labels, classes = read(Path("kept/set.safetensors"))
    order = [row["index"] for row in sorted(found, key=lambda x: x["index"]) if not row["left_out"]]
    assert torch.equal(kept, poison.apply(tiny.train).images[order])
    assert labels is not None
    assert tiny.train.labels is not None
    assert torch.equal(labels, tiny.train.labels[order])
    assert classes == CLASSES


# Going on ----------------------------------------------------------------------------------------


def test_a_second_run_goes_on_where_the_first_was_stopped(
    audit_, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (files.ok, "--teacher", files.teacher, "--screens", "consistency,near_duplicate")
    with monkeypatch.context() as stopped:
        stopped.setattr(
            NearDuplicate, "suspicion", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        first = audit_(*arguments)
    assert first.code == 130
    assert not Path("audits").exists()
    second = audit_(*arguments)
    assert second.code == 0
    for name in ("teacher", "consistency"):
        assert f"[{name}] note: found in the store" in second.out
    assert "[near_duplicate] note" not in second.out
    before = rows(Path("audits/ok"))
    third = audit_(*arguments)
    assert "[near_duplicate] note: found in the store" in third.out
    assert rows(Path("audits/ok")) == before
    other = audit_(files.bad, "--teacher", files.teacher, "--screens", "near_duplicate")
    assert "found in the store" not in other.out


# Files that are none -----------------------------------------------------------------------------


def strange(folder: Path) -> dict[str, str]:
    """Puts files that cannot be read into a folder, by what is to be said of them."""
    whole = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12))
    whole.save(folder / "whole.png")
    encoded = (folder / "whole.png").read_bytes()
    (folder / "truncated.png").write_bytes(encoded[: len(encoded) // 2])
    (folder / "random.jpg").write_bytes(bytes(range(256)))
    (folder / "empty.webp").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    whole.save(folder / "tiff.png", "TIFF")
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 99, 255)]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    Image.new("1", (9000, 9000)).save(folder / "large.png")
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "tied").symlink_to(folder / CLASSES[0])
    whole.convert("CMYK").save(folder / "cmyk.jpg")
    whole.save(folder / ".hidden.png")
    return {
        "truncated.png": "expected a whole PNG or JPEG or WEBP image",
        "random.jpg": "expected a whole PNG or JPEG or WEBP image, found another kind of file",
        "empty.webp": "expected a whole PNG or JPEG or WEBP image, found another kind of file",
        "notes.txt": "expected a picture (.png, .jpg, .jpeg, .webp), found another kind of file",
        "tiff.png": "expected a whole PNG or JPEG or WEBP image, found another kind of file",
        "animated.webp": "expected a still image, found 3 frames",
        "huge.png": "expected a whole PNG or JPEG or WEBP image",
        "large.png": "expected at most 67108864 pixels, found 81000000",
        "out.png": "expected to stay in",
        "loop.png": "expected ",
        "tied": "expected a picture, found a link to a folder, not followed",
        "pipe.png": "expected a regular file, found something else",
    }


def test_strange_files_are_named_and_skipped_or_refused(
    audit_, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(stripes(18, 1), tmp_path / "strange")
    Image.new("L", (12, 12)).save(tmp_path / "secret.png")
    expected = strange(folder)
    decoded: list[int] = []
    load = Image.Image.load
    monkeypatch.setattr(
        Image.Image, "load", lambda self: (decoded.append(self.width * self.height), load(self))[1]
    )
    arguments = (folder, "--teacher", files.teacher, "--screens", "near_duplicate")
    ended = audit_(*arguments)
    assert (ended.code, ended.err) == (0, "")
    assert "12 files were not read:" in ended.out
    warning = "WARNING: 12 of 32 files of the set were not read: nothing is said of them."
    assert warning in one_line(ended.out)
    skipped = read_json(Path("audits/strange/verdict.json"))["skipped"]
    assert skipped.keys() == expected.keys()
    for name, reason in expected.items():
        assert skipped[name].startswith(reason), name
    assert {row["name"] for row in rows(Path("audits/strange"))} == {
        "whole.png", "cmyk.jpg", *(f"{CLASSES[i % 4]}/{i:04}.png" for i in range(18)),
    }  # fmt: skip
    assert max(decoded) <= 1 << 26  # nothing beyond the limit was unpacked
    refused = audit_(*arguments, "--broken", "refuse")
    assert refused.code == 2
    assert refused.err.startswith(f"foreshot: {folder}/animated.webp: expected a still image")
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere",), "nowhere: expected a folder of pictures or a safetensors file, found"),
        (("empty",), "empty: expected pictures (.png, .jpg, .jpeg, .webp), found no file"),
        (("other",), "other: expected pictures (.png, .jpg, .jpeg, .webp), found none that "
            "can be read of 2, the first being a.txt: expected a picture (.png, .jpg, "),
        (("OK/../t.safetensors",), "OK/../t.safetensors: expected a tensor 'images', found mean, "),
        (("OK", "--out", "other/a.txt/b"), "other/a.txt/b: expected a folder or none yet, found /"),
        (("OK", "--screens", "consistancy"), "--screens: found 'consistancy'; did you mean"),
        (("OK", "--out", "run"), "run: expected a folder for the report, found a run's"),
        (("OK", "--screens", "strip", "--clean", "OK"), "screen strip: expected a student (--dist"),
        (("OK", "--second", "bare.safetensors"), "bare.safetensors: expected metadata "
            "foreshot-model, found none\n"),
        (("OK", "--screens", "combined"), "--screens: found 'combined'; "),
        (("OK", "--screens", "frequency"), "screen frequency: expected clean images (--clean), "),
        (("OK", "--screens", "label_disagreement"), "screen label_disagreement: expected labels ("),
        (("OK", "--screens", "strip"), "screen strip: expected "),
        (("OK", "--distil"), "--distil: expected clean images (--clean), found none"),
        (("OK", "--write-clean", "empty/.."), "empty/..: expected no folder or an empty one"),
        (("OK", "--write-clean", "OK/kept"), "OK/kept: expected a folder outside "),
        (("OK", "--clean", "other", "--write-clean", "other/kept"), "other/kept: expected a folder "
            "outside other"),
        (("OK", "--distil", "--screens", "spectral_signature"), "--distil: expected clean images"),
        (("OK", "--out", "OK/report"), "OK/report: expected a folder for the report outside OK; "),
        (("OK", "--write-clean", "audits"), "audits: expected a folder apart from the report's, "),
        (("wide.safetensors",), "wide.safetensors: expected images of the teacher's shape (1, 12"),
        (("bare.safetensors", "--labels"), "bare.safetensors: expected labels, found none"),
        (("OK", "--architecture", "resnet"), "--architecture: found 'resnet'; expected one of "),
        (("OK", "--architecture", "{"), "--architecture: expected YAML: "),
        (("OK", "--architecture", "2001-99-99"), "--architecture: expected YAML: "),
        (("OK", "--architecture", "{name: [timm]}"), "--architecture: found ['timm']; expected "),
        (("OK", "--architecture", "{name: timm, modle: a}"), "--architecture: modle: no such key"),
        (("OK", "--architecture", "timn"), "--architecture: found 'timn'; did you mean 'timm'?"),
        (("OK", "--second", "wide.safetensors"), "wide.safetensors: expected metadata foreshot-m"),
        (("OK", "--alarm", "0"), "Invalid value for '--alarm'"),
    ],
)  # fmt: skip
def test_a_users_error_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], sentence: str, audit_, files: Files, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    for name in ("a.txt", "b.txt"):
        (tmp_path / "other" / name).write_text("no picture")
    (tmp_path / "OK").symlink_to(files.ok)
    save_file({"images": torch.zeros(3, 1, 9, 9, dtype=torch.uint8)}, "wide.safetensors")
    save_file({"images": torch.zeros(3, 1, 12, 12, dtype=torch.uint8)}, "bare.safetensors")
    ended = audit_(*arguments, "--teacher", files.teacher)
    assert ended.code == 2
    assert ended.err.startswith(f"foreshot: {sentence}")
    assert ended.err.count("\n") == 1
    assert not Path("audits").exists()


def test_an_error_of_its_own_is_no_verdict(
    audit_, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 would be a suspicious set."""
    monkeypatch.setattr(NearDuplicate, "suspicion", lambda *_: 1 / 0)
    ended = audit_(files.ok, "--teacher", files.teacher, "--screens", "near_duplicate")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("foreshot: an error of its own, which you could")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 8, 8), "images of 1 or 3 channels, found one of 4"), ((3, 8, 9), "of square images")],
)
def test_pictures_that_a_teacher_cannot_be_given_are_refused(
    shape: tuple[int, int, int], message: str, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ForeshotError, match=message):
        read_set(tmp_path, Wanted(shape=shape, classes=("a", "b"), cache=tmp_path / "cache"))


def test_labels_of_no_class_of_the_teacher_are_skipped(
    audit_, files: Files, tmp_path: Path
) -> None:
    folder = put(stripes(8, 1), tmp_path / "set")
    (folder / "blob").rename(folder / "blub")
    shutil.copy(folder / "vertical" / "0001.png", folder / "top.png")
    common = ("--teacher", files.teacher, "--labels", "--screens", "label_disagreement")
    audit_(folder, *common)
    skipped = read_json(Path("audits/set/verdict.json"))["skipped"]
    assert skipped.keys() == {"blub/0003.png", "blub/0007.png", "top.png"}
    assert (
        "expected a folder named as a class of the teacher; did you mean 'blob'?"
        in (skipped["blub/0003.png"])
    )


# Names that mean harm ----------------------------------------------------------------------------


@pytest.fixture
def hostile(files: Files, tiny: Tiny, audit_, tmp_path: Path) -> tuple[Ended, str]:
    """What is printed, and the page, where names of files and classes mean harm."""
    classes = (HOSTILE, "\x1b[31mred\x1b[0m", "[bold]markup[/bold]", "{{ 7 * 7 }}" * 90)
    save_model(tmp_path / "t.safetensors", tiny.teacher, ARCHITECTURE, (1, SIDE, SIDE), classes)
    folder = put(stripes(20, 1), tmp_path / "set")
    picture = next(folder.rglob("*.png"))
    for name in (
        "<img src=x onerror=\"document.title='owned'\">.png",
        "\x1b]0;owned\x07\nSUSPICIOUS.png",
        "[bold red]markup.png",
        os.fsdecode(b"\xff\xfe.png"),
        "' onload='x.png",
    ):
        shutil.copy(picture, folder / name)
        (folder / f"{name}.txt").write_text("no picture")
    ended = audit_(folder, "--teacher", tmp_path / "t.safetensors", "--screens", "near_duplicate")
    return ended, (tmp_path / "audits/set/report.html").read_text(encoding="utf-8")


def test_hostile_names_are_text(hostile: tuple[Ended, str]) -> None:
    ended, text = hostile
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "ol", "li", "img",
        "strong", "table", "tr", "td",
    }  # fmt: skip
    for tag, attributes in page.tags:
        assert attributes.keys() <= {
            "lang", "charset", "name", "content", "http-equiv", "class", "src", "alt",
        }  # fmt: skip
        assert tag != "img" or str(attributes["src"]).startswith("data:image/png;base64,")
    assert sum(tag == "img" for tag, _ in page.tags) == 25
    assert "&lt;script&gt;" in text
    assert "49" * 9 not in text
    assert "\x1b" not in ended.out + text
    assert "[bold red]markup.png" in ended.out
    assert r"\x1b]0;owned\x07\nSUSPICIOUS.png" in ended.out + text
    assert r"\udcff\udcfe.png" in ended.out + text
    assert printable("é漢 <a>\n") == "é漢 <a>\\n"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_real_browser_runs_nothing_of_hostile_names(
    hostile: tuple[Ended, str], tmp_path: Path
) -> None:
    page = tmp_path / "audits/set/report.html"
    # That the browser would run it, if it were there: else the test says nothing.
    naive = tmp_path / "naive.html"
    naive.write_text(f"<title>before</title>{HOSTILE}")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}"]
    seen = []
    for path in (naive, page):
        ended = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
        )
        seen.append(ended.stdout)
    assert re.search("<title>(owned|again)</title>", seen[0])
    assert "<title>foreshot audit: clean</title>" in seen[1]
    assert sum(tag == "script" for tag, _ in Page(seen[1]).tags) == 0


def test_the_page_is_small_and_shows_what_changes_do(
    files: Files, tmp_path: Path, tiny: Tiny
) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 200, 200), generator=random).to(torch.uint8)

    class Bright(torch.nn.Module):
        """Calls noise `loud`, and what is smoother `calm`."""

        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(1, 2)
            self.last.weight.data = torch.tensor([[100.0], [-100.0]])
            self.last.bias.data = torch.tensor([-25.0, 25.0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(x.std((1, 2, 3))[:, None])

    from foreshot.audit.data import audit
    from foreshot.audit.reading import Found

    transfer = ImageSet(images, None, ("loud", "calm"))
    done = audit(transfer, Bright(), screens=[NearDuplicate(compared=4)])
    report = reports.Report(done, Found(transfer, list(map(str, range(60))), {}), {}, tmp_path, {})
    text = report.html()
    assert len(text.encode()) < 3_000_000
    assert text.count("<li>") == 48
    assert text.count("<tr><td>as it is</td><td>loud 100%") == 48
    # Noise survives a shift, not a blur.
    assert text.count('<tr><td>blur</td><td class="reverted">calm') == 48
    assert text.count("<tr><td>shift</td><td>loud") == 48
    for word in ("prefers-color-scheme: dark", "image-rendering: pixelated", "width=device-width"):
        assert word in text
    assert "http" not in text.replace("http-equiv", "")


def test_what_has_changed_since_it_was_screened_is_not_kept(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    source, secret = tmp_path / "set", tmp_path / "secret"
    shutil.copytree(files.ok, source)
    secret.write_text("of somebody else")
    victim = next(source.glob("*/*.png"))

    def swap(event: Event) -> None:
        if (event.stage, event.kind) == ("near_duplicate", "end"):
            victim.unlink()
            victim.symlink_to(secret)

    kept = tmp_path / "kept"
    job = Job(source, files.teacher, tmp_path / "out", screens=("near_duplicate",), device="cpu")
    with pytest.raises(ForeshotError, match="found a link that leads out"):
        replace(job, write_clean=kept).run(swap)

    def overwrite(event: Event) -> None:
        if (event.stage, event.kind) == ("near_duplicate", "end"):
            victim.write_bytes(b"another picture")

    victim.unlink()
    shutil.copyfile(files.ok / victim.relative_to(source), victim)
    with pytest.raises(ForeshotError, match="expected what was screened, found it changed"):
        replace(job, write_clean=kept, out=tmp_path / "again").run(overwrite)
    assert not kept.exists()


@pytest.mark.parametrize("count", [160, 90])
def test_of_a_file_that_has_changed_nothing_is_kept(
    files: Files, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    source = tmp_path / "set.safetensors"
    save_images(source, stripes(160, 7))
    job = Job(source, files.teacher, tmp_path / "out", screens=("near_duplicate",), device="cpu")
    replace(job, write_clean=tmp_path / "kept").run()
    kept = read_tensors(tmp_path / "kept/set.safetensors")[0]
    assert torch.equal(kept["images"], stripes(160, 7).images)

    def overwrite(event: Event) -> None:
        if (event.stage, event.kind) == ("near_duplicate", "end"):
            save_images(source, stripes(count, 8))

    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "other"))
    with pytest.raises(ForeshotError, match="expected what was screened, found it changed"):
        replace(job, write_clean=tmp_path / "again").run(overwrite)
    assert not (tmp_path / "again").exists()


def test_a_second_teacher_of_other_classes_is_refused(files: Files, tiny: Tiny, tmp_path) -> None:
    other = tmp_path / "other.safetensors"
    save_model(other, tiny.teacher, ARCHITECTURE, (1, SIDE, SIDE), tuple("abcd"))
    job = Job(files.ok, files.teacher, tmp_path / "out", second=other, device="cpu")
    with pytest.raises(ForeshotError, match="as the teacher's, found .* 4 classes of other names"):
        job.run()
