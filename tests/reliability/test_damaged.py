"""What is damaged is noticed and named, and computed again or refused; it is never used."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import Place, ended, flip, full

import foreshot.data.mapped
from conftest import Tiny
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.files import DIGEST, naming, read_tensors, remove_parts, write_tensors
from foreshot.models import ResNet, build
from foreshot.models.checkpoint import state_digest
from foreshot.progress import Event, write_events
from foreshot.record import load_run
from foreshot.store import DONE, Store
from foreshot.training import Samples, Supervised, Training, fit
from foreshot.triggers import Blend
from foreshot.triggers.learned import save_picture


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that nothing befell."""
    place = Place(tmp_path_factory.mktemp("whole"))
    assert place.run() == 0
    return place


@pytest.fixture
def copy(whole: Place, tmp_path: Path) -> Place:
    return Place(Path(shutil.copytree(whole.root, tmp_path / "copy")))


def notes(place: Place, out: str = "out") -> list[str]:
    """The sentences of all runs into a folder."""
    lines = (place.root / out / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event["message"] for event in events if event["kind"] == "note"]


def started(place: Place, *outs: str) -> Counter[str]:
    """How often each stage was begun."""
    lines = [line for out in outs for line in (place.root / out / "events.jsonl").open()]
    events = [json.loads(line) for line in lines]
    return Counter(event["stage"] for event in events if event["kind"] == "start")


# Several at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [pytest.param("elsewhere", marks=pytest.mark.slow), "out"])
def test_two_runs_at_once_compute_each_stage_once(other: str, whole: Place, tmp_path: Path) -> None:
    place = Place(tmp_path)
    processes = [place.start(), place.start(out=other)]
    assert [ended(process) for process in processes] == [0, 0]
    for out in {"out", other}:
        found, expected = place.artefacts(out), whole.artefacts()
        command = found["manifest"].pop("command")
        assert command[-1] in ("out", other)
        del expected["manifest"]["command"]
        renamed = {name.replace(f"{out}/", "out/"): value for name, value in found.items()}
        assert renamed == expected
        load_run(place.root / out)
    assert set(started(place, *{"out", other}).values()) == {1}


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    dead, mine, odd = (tmp_path / f".a.{pid}.part" for pid in (2**22 + 1, 1, "x"))
    for part in (dead, mine, odd):
        part.touch()
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]


# No room -----------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(whole: Place, tmp_path: Path) -> None:
    """To a process, no file can grow beyond a number of bytes."""
    place, named = Place(tmp_path), []
    for size in (600, 20_000):
        assert place.run(before=full(size)) == 2
        assert place.said.startswith("foreshot: ")
        assert place.said.endswith(": file too large\n")
        assert place.said.count("\n") == 1
        named.append(Path(place.said.split(": ")[1]).name)
        assert not list(place.root.rglob("*.part"))
    assert named == ["config.yaml", ".teacher.safetensors"]
    assert place.run() == 0
    assert place.artefacts() == whole.artefacts()


def test_a_mapped_set_that_the_disk_does_not_hold_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write to a page of it that there is no room for would end the process."""
    monkeypatch.setattr(foreshot.data.mapped, "HELD", 0)

    def refuse(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foreshot.data.mapped.os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left on device") as caught:
        foreshot.data.mapped.room((2, 1, 8, 8), tmp_path)
    assert caught.value.filename == str(tmp_path)
    del caught
    assert not list(tmp_path.iterdir())


def test_the_file_is_named_where_the_system_does_not() -> None:
    for given, expected in ((None, "mine"), ("theirs", "theirs")):
        with pytest.raises(PermissionError) as caught, naming(Path("mine")):
            raise PermissionError(13, "denied", given)
        assert caught.value.filename == expected


# What is no folder, or no file -------------------------------------------------------------------

FILES = ("home", "home/store", "home/store/locks", "home/store/work", "home/store/teacher")


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_the_place_of_a_folder_is_named(name: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    assert place.run("--set", "teacher.training.epochs=1") == 2
    assert place.said.startswith(f"foreshot: {name}")
    assert place.said.count("\n") == 1
    assert path.read_text() == "x"


def test_a_folder_in_the_place_of_a_file_is_named(copy: Place) -> None:
    (copy.out / "student.safetensors").unlink()
    (copy.out / "student.safetensors").mkdir()
    assert copy.run() == 2
    assert "student.safetensors: is a directory" in copy.said
    (copy.out / "student.safetensors").rmdir()
    assert copy.run() == 0


# The store ---------------------------------------------------------------------------------------


def truncate(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])


@pytest.mark.parametrize("damage", [flip, pytest.param(truncate, marks=pytest.mark.slow)])
def test_every_artefact_of_the_store_is_checked(damage, whole: Place, copy: Place) -> None:
    chance, stages = random.Random(3), []
    for marker in sorted(copy.home.glob(f"store/*/*/{DONE}")):
        name = chance.choice(sorted(json.loads(marker.read_text())["digests"]))
        damage(marker.parent / name, chance)
        stages.append(marker.parent.relative_to(copy.root))
    kinds = {stage.parts[2] for stage in stages}
    assert {"evaluate", "poison", "screen", "student", "teacher"} <= kinds
    before = len(notes(copy))
    assert copy.run() == 0
    said = notes(copy)[before:]
    for stage in stages:
        assert any(note.startswith(f"{stage} is damaged (") for note in said), stage
    assert copy.artefacts() == whole.artefacts()


@pytest.mark.slow
def test_a_store_that_is_partly_gone_is_made_whole(whole: Place, copy: Place) -> None:
    chance = random.Random(4)
    for path in sorted(copy.home.rglob("*")):
        if path.exists() and chance.random() < 0.3:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert copy.run() == 0
    assert copy.artefacts() == whole.artefacts()


@pytest.mark.slow
def test_a_store_that_goes_while_it_is_used_ends_well_or_in_a_sentence(
    whole: Place, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    process = place.start()
    while not (place.home / "store/poison").exists():
        process.join(0.01)
    shutil.rmtree(place.home, ignore_errors=True)
    assert ended(process) in (0, 2)
    assert "Traceback" not in place.said
    assert place.run() == 0
    assert place.artefacts() == whole.artefacts()


def test_a_flipped_bit_of_the_marker_never_changes_what_is_found(tmp_path: Path) -> None:
    def compute(folder: Path) -> None:
        (folder / "result").write_text("right")

    store, chance = Store(tmp_path), random.Random(5)
    first = store.stage("stage", {"x": 1}, compute)
    for _ in range(100):
        flip(first.folder / DONE, chance)
        again = store.stage("stage", {"x": 1}, compute)
        assert again.digests == first.digests
        assert (again.folder / "result").read_text() == "right"


# Checkpoints, and what is written by write_tensors -----------------------------------------------


def test_no_flipped_bit_of_a_written_file_passes(tmp_path: Path) -> None:
    file, chance = tmp_path / "file", random.Random(6)
    tensors, about = {"a": torch.arange(40.0), "b": torch.tensor([7])}, {"epochs": 3, "x": "é"}
    write_tensors(file, tensors, about)
    content, refused = file.read_bytes(), 0
    for _ in range(400):
        file.write_bytes(content)
        flip(file, chance)
        try:
            found, header = read_tensors(file)
        except ForeshotError:
            refused += 1
            continue
        # The name of the digest itself, or white space after the header.
        header.pop(next((key for key in header if key not in about), DIGEST), None)
        assert header == about
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert 350 < refused < 400


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_checkpoint_is_named_and_the_training_starts_anew(
    damage, tiny: Tiny, tmp_path: Path
) -> None:
    schedule, checkpoint = Training(epochs=3, batch=40, lr=0.1), tmp_path / ".x.safetensors"
    assert tiny.train.labels is not None
    samples = Samples(tiny.train.images, {"y": tiny.train.labels})

    def trained(listener=lambda event: None) -> str:
        model = build(ResNet(depth=8, width=0.25, stem_stride=2), samples.images, 4, 0, "x")
        module = Supervised(model)
        fit(module, samples, schedule, CPU, seed=0, stage="x",
            listener=listener, checkpoint=checkpoint)  # fmt: skip
        return state_digest(module)

    right = trained()
    chance = random.Random(7)
    damage(checkpoint, chance)
    heard: list[Event] = []
    assert trained(heard.append) == right
    assert heard[0].kind == "note"
    assert heard[0].message.startswith(f"{checkpoint}: expected ")
    assert heard[0].message.endswith("; it starts anew")
    count = len(samples.images)
    assert heard[1] == Event("x", "start", 0, 3 * count, message=f"3 epochs of {count} images")


# The run folder, and what is taken from it -------------------------------------------------------


def test_every_file_of_a_run_folder_is_made_good(whole: Place, copy: Place) -> None:
    chance = random.Random(8)
    for path in sorted(p for p in copy.out.rglob("*") if p.is_file()):
        if path.name not in ("config.yaml", "events.jsonl", "manifest.json"):
            flip(path, chance)
    assert copy.run() == 0
    assert copy.artefacts() == whole.artefacts()
    assert (copy.out / "metrics.json").read_bytes() == (whole.out / "metrics.json").read_bytes()
    load_run(copy.out)


def test_a_flipped_bit_of_the_config_is_refused(copy: Place) -> None:
    data = bytearray((copy.out / "config.yaml").read_bytes())
    data[-2] ^= 1
    (copy.out / "config.yaml").write_bytes(data)
    assert copy.run() == 2
    assert "found another one" in copy.said


@pytest.mark.parametrize("kind", ["teacher", "poison"])
def test_a_flipped_bit_of_a_given_file_is_refused(kind: str, copy: Place) -> None:
    from processes import TEXT

    from foreshot.config import parse
    from foreshot.experiment import run

    file = copy.out / f"{kind}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    with pytest.raises(ForeshotError, match=f"{kind}.safetensors: expected digest [0-9a-f]+, fou"):
        run(
            parse(TEXT, "tiny"),
            copy.root / "new",
            store=copy.home / "store",
            device="cpu",
            teacher=file if kind == "teacher" else None,
            poison=file if kind == "poison" else None,
        )


def test_a_flipped_bit_of_a_learned_trigger_is_refused_or_of_no_effect(tmp_path: Path) -> None:
    file, chance = tmp_path / "trigger-pattern.png", random.Random(9)
    random_ = torch.Generator().manual_seed(0)
    save_picture(file, torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8, generator=random_))
    content, refused = file.read_bytes(), 0
    right = Blend().learned(file).picture((3, 9, 9))
    for _ in range(200):
        file.write_bytes(content)
        flip(file, chance)
        try:
            found = Blend().learned(file).picture((3, 9, 9))
        except ForeshotError:
            refused += 1
        else:
            assert torch.equal(found, right)
    assert refused > 150


def test_events_wait_for_their_folder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    tell = write_events(path)
    for stage in "abc":
        tell(Event(stage, "start"))
        if stage == "b":
            assert not path.parent.exists()
            path.parent.mkdir()
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_events(path)(Event("a", "start"))
    path.write_text(path.read_text() + '{"time": 1, "sta')
    tell = write_events(path)
    for stage in "bc":
        tell(Event(stage, "start"))
    first, cut, *rest = path.read_text().splitlines()
    assert json.loads(first)["stage"] == "a"
    assert cut == '{"time": 1, "sta'
    assert [json.loads(line)["stage"] for line in rest] == ["b", "c"]
