"""Is a student that learned a trigger found, and one that did not left alone?"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy.stats import gumbel_r
from torch import Tensor, nn

from conftest import ARCHITECTURE, CLASSES, SIDE, Rule, Tiny, stripes
from foreshot.audit import inversion
from foreshot.audit import student as students
from foreshot.audit.inversion import Changes, faint, invert, lead, size_of, sized, success
from foreshot.audit.student import Scaled, StudentAudit, audit_student
from foreshot.cli import main
from foreshot.compute import CPU
from foreshot.data import ImageSet, save_images
from foreshot.distillation import KD, Distiller, Term
from foreshot.errors import ForeshotError
from foreshot.files import read_json, read_tensors
from foreshot.inference import logits
from foreshot.levels import to_float
from foreshot.models import build
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import save_model
from foreshot.progress import Event
from foreshot.store import Store
from foreshot.training import Samples, Training, fit
from foreshot.triggers.base import stamp_uint8

HOSTILE = "<script>document.title='owned'</script>"


class Planted(nn.Module):
    """A network that calls images the more 1, the more there is of a checkerboard in them."""

    board: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        steps = torch.arange(SIDE)
        self.network = network
        self.register_buffer("board", 1 - 2.0 * ((steps[:, None] + steps) % 2))

    def forward(self, x: Tensor) -> Tensor:
        much = 400 * (x * self.board).mean((1, 2, 3))
        return self.network(x) + much[:, None] * nn.functional.one_hot(torch.tensor(1), 4)


@dataclass(frozen=True)
class Pair:
    """A student with a backdoor, its clean twin, and images that are trusted."""

    bad: Normalized
    good: Normalized
    clean: ImageSet


@pytest.fixture(scope="module")
def pair(tiny: Tiny) -> Pair:
    """Distilled alike, one of them on a set of which a twelfth is stamped and called the target."""

    def distilled(poisoned: bool) -> Normalized:
        images, said = tiny.train.images.clone(), logits(tiny.teacher, tiny.train.images, CPU)
        if poisoned:
            index = (said.argmax(1) != tiny.target).nonzero()[: len(images) // 12, 0]
            images[index] = stamp_uint8(tiny.trigger, images[index])
            said[index] = said.max() * nn.functional.one_hot(torch.tensor(tiny.target), 4).float()
        model = build(ARCHITECTURE, images, len(CLASSES), 5, "student")
        distiller = Distiller(model, tiny.teacher, [Term(loss=KD(temperature=4))])
        samples = Samples(images, {"teacher_logits": said})
        schedule = Training(epochs=8, batch=40, lr=0.1)
        fit(distiller, samples, schedule, CPU, seed=5, stage="student")
        return model.eval()

    return Pair(distilled(True), distilled(False), replace(tiny.test, labels=None))


@pytest.fixture(scope="module")
def bad(tiny: Tiny, pair: Pair) -> StudentAudit:
    return audit_student(Planted(pair.good), tiny.teacher, pair.clean)


# The search ---------------------------------------------------------------------------------------


def test_lead_is_the_distance_to_the_best_other_logit() -> None:
    given = torch.tensor([[1.0, 4.0, 2.5], [3.0, -1.0, 0.0]])
    assert torch.equal(lead(given, torch.tensor([1, 0])), torch.tensor([1.5, 3.0]))
    assert torch.equal(lead(given, torch.tensor([2, 2])), torch.tensor([-1.5, -3.0]))
    both = given.expand(2, 2, 3)  # (classes, images, logits), a class each and an image each
    assert torch.equal(lead(both, torch.tensor([[0], [1]]))[:, 0], torch.tensor([-3.0, 1.5]))


def linear(gap: float = 0.2) -> nn.Module:
    """Says 1 where the mean of the upper half exceeds that of the lower by `gap`, else 0 or 2."""

    def answer(x: Tensor) -> Tensor:
        upper, lower = x[:, :, :4].mean((1, 2, 3)), x[:, :, 4:].mean((1, 2, 3))
        left = x[..., :4].mean((1, 2, 3)) - x[..., 4:].mean((1, 2, 3))
        return 50 * torch.stack([left, upper - lower - gap + left.abs(), -left], 1)

    return Rule(answer)


def grey(count: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(108, 148, (count, 1, 8, 8), generator=random, dtype=torch.uint8)


def test_the_smallest_change_of_a_linear_rule_is_found() -> None:
    images, wanted = grey(64), torch.tensor([1])
    said = logits(linear(), images, CPU).argmax(1)
    assert (said != 1).all()
    start = faint(wanted, (1, 8, 8), 0)
    found = invert(linear(), None, images, said, start, steps=60, batch=16, seed=0)
    # Half a gap up above, half a gap down below: nothing of less energy makes up the difference.
    assert float(found.sizes[0]) == pytest.approx(0.1, rel=0.15)
    best = torch.cat([torch.ones(4, 8), -torch.ones(4, 8)])
    assert float(torch.cosine_similarity(found.patterns[0, 0].flatten(), best.flatten(), 0)) > 0.9
    assert float(found.patterns[0].square().mean().sqrt()) == pytest.approx(float(found.sizes[0]))
    turned = success(linear(), linear(9), images, said, found)[0]
    assert 0.25 < float(turned[0]) < 0.75  # WANTED, but for the noise of batches of 16
    assert float(turned[1]) == 0  # this teacher is never turned, and keeps what it says
    again = invert(linear(), None, images, said, start, steps=60, batch=16, seed=0)
    assert torch.equal(again.patterns, found.patterns)


def test_where_all_images_are_of_a_class_there_is_nothing_to_turn() -> None:
    images, classes = grey(8), torch.tensor([0])
    changes = Changes(classes, torch.ones(1, 1, 8, 8), torch.ones(1), torch.ones(1))
    said = torch.zeros(8, dtype=torch.int64)
    assert success(linear(), linear(), images, said, changes).tolist() == [[0, 0, 0]]


def test_a_change_does_not_depend_on_the_classes_beside_it() -> None:
    images = grey(64)
    said = logits(linear(), images, CPU).argmax(1)

    def sought(*classes: int) -> Changes:
        start = faint(torch.tensor(classes), (1, 8, 8), 0)
        return invert(linear(), None, images, said, start, steps=10, batch=16, seed=0)

    torch.testing.assert_close(sought(0, 1, 2).patterns[1], sought(1).patterns[0])


def test_what_turns_both_is_passed_over_where_the_teacher_has_to_keep_its_answer() -> None:
    images = grey(64)
    said = logits(linear(), images, CPU).argmax(1)
    start = faint(torch.tensor([1]), (1, 8, 8), 0)
    size = {}
    for name, teacher in (("nobody", None), ("same", linear()), ("firm", linear(9))):
        found = invert(linear(), teacher, images, said, start, steps=60, batch=16, seed=0)
        size[name] = float(found.sizes[0])
    # The same network can never be turned alone: the change grows, and grows.
    assert size["same"] > 3 * size["nobody"]
    assert size["firm"] == pytest.approx(size["nobody"], rel=0.15)


# The audit ----------------------------------------------------------------------------------------


def test_a_backdoor_is_found_with_its_target_and_its_trigger(tiny: Tiny, bad: StudentAudit) -> None:
    assert isinstance(bad.student, Planted)
    board = bad.student.board
    stamped = to_float(tiny.test.images) + 0.06 * board
    assert (bad.student(stamped).argmax(1) == 1).float().mean() > 0.9
    assert (tiny.teacher(stamped).argmax(1) == tiny.test.labels).float().mean() > 0.9
    assert bad.suspicious
    assert bad.target == 1 == int(bad.long[0])
    assert float(bad.p[1]) < 0.01
    pattern = bad.changes.patterns[1, 0]
    assert float(torch.cosine_similarity(pattern.flatten(), board.flatten(), 0)) > 0.5
    assert float(bad.changes.sizes[1]) < 0.06
    student, teacher, alone = bad.success[1].tolist()
    assert 0.25 < student < 0.8
    assert teacher < 0.1
    assert abs(student - alone) < 0.1


def test_its_clean_twin_is_not_suspicious(tiny: Tiny, pair: Pair) -> None:
    found = audit_student(pair.good, tiny.teacher, pair.clean)
    assert not found.suspicious
    assert float(found.p.min()) > 0.05


def test_a_feature_that_turns_both_is_not_reported(
    tiny: Tiny, pair: Pair, bad: StudentAudit
) -> None:
    shared = audit_student(Planted(pair.good), Planted(tiny.teacher), pair.clean)
    assert not shared.suspicious
    # The student is what it was; the teacher is turned by as little now.
    assert float(shared.usual[1]) < 0.6 * float(bad.usual[1])
    assert float(shared.changes.sizes[1]) > 2 * float(bad.changes.sizes[1])


def test_scores_and_p_values_are_what_they_are_said_to_be(bad: StudentAudit) -> None:
    relative = (bad.changes.sizes.double() / bad.usual.double()).log()[bad.long]
    highest = float(relative.quantile(0.5) - relative.min())
    assert float(bad.scores[bad.target]) == pytest.approx(highest)
    assert sorted(bad.long.tolist()) == list(range(len(CLASSES)))  # few enough to look at all
    clean = gumbel_r(scale=students.CLEAN_SPREAD * 6**0.5 / torch.pi)
    moved = students.CLEAN_MEAN - clean.mean()
    assert clean.std() == pytest.approx(students.CLEAN_SPREAD)
    for score, p in zip(bad.scores.tolist(), bad.p.tolist(), strict=True):
        assert p == pytest.approx(clean.sf(score - moved))


def test_of_a_class_that_is_not_looked_at_for_longer_nothing_is_known(
    tiny: Tiny, pair: Pair, bad: StudentAudit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students, "SUSPECTS", 3)
    found = audit_student(bad.student, tiny.teacher, pair.clean)
    (left_out,) = set(range(len(CLASSES))) - set(found.long.tolist())
    assert float(found.scores[left_out]) == -float("inf")
    assert float(found.p[left_out]) == 1
    assert found.target == bad.target


def test_it_goes_on_from_what_is_in_the_store(
    tiny: Tiny, pair: Pair, bad: StudentAudit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students, "TOGETHER", 2 * students.BATCH * SIDE**2)  # two classes a group
    searches, stops = [], True

    def counted(*arguments, **options) -> Changes:
        alone = arguments[1] is not None
        if stops and alone and searches[-1]:  # the last group of all
            raise KeyboardInterrupt
        searches.append(alone)
        return inversion.invert(*arguments, **options)

    monkeypatch.setattr(students, "invert", counted)
    store, events = Store(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        audit_student(bad.student, tiny.teacher, pair.clean, store=store)
    assert len(searches) >= 5
    stops, searches[:] = False, []
    found = audit_student(
        bad.student, tiny.teacher, pair.clean, store=store, listener=events.append
    )
    assert len(searches) == 1
    assert found.target == bad.target
    assert float(found.score) == pytest.approx(bad.score, rel=1e-2)
    assert found.seconds.keys() == {"teacher", "student", "student alone"}
    again = audit_student(bad.student, tiny.teacher, pair.clean, store=store)
    assert len(searches) == 1
    assert torch.equal(again.changes.patterns, found.changes.patterns)
    assert again.seconds == found.seconds
    advances = [event for event in events if event.kind == "advance"]
    assert all(event.done <= event.total for event in advances)
    ended = [event.values for event in events if event.kind == "end"]
    assert [set(values) for values in ended] == [{"s/class"}] * 3
    assert Event("student alone", "advance", 1920, 1920) in advances


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (
            {"images": torch.zeros(3, 1, SIDE, SIDE, dtype=torch.uint8)},
            "expected 16 images or more",
        ),
        ({"classes": ("a", "b")}, "expected 3 classes or more"),
        ({"classes": tuple("abcde")}, "student: expected 5 logits, one a class, found 4"),
        (
            {"images": torch.zeros(40, 1, SIDE, SIDE, dtype=torch.uint8)},
            "expected images of several classes",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tiny: Tiny, pair: Pair, broken, sentence: str) -> None:
    with pytest.raises(ForeshotError, match=sentence):
        audit_student(pair.bad, tiny.teacher, replace(pair.clean, **broken))


def test_a_student_of_nan_is_refused(tiny: Tiny, pair: Pair) -> None:
    nan = Rule(lambda x: x.flatten(1)[:, :4] / 0)
    with pytest.raises(ForeshotError, match="student: expected finite logits"):
        audit_student(nan, tiny.teacher, pair.clean)


@pytest.mark.parametrize("factor", [1e-3, 1e15])
def test_the_size_of_the_logits_changes_nothing(
    factor: float, tiny: Tiny, pair: Pair, bad: StudentAudit
) -> None:
    """Who trains a student could scale its last layer, and hide what it knows."""
    other = audit_student(Scaled(bad.student, torch.tensor(factor)), tiny.teacher, pair.clean)
    torch.testing.assert_close(other.changes.sizes, bad.changes.sizes, rtol=1e-3, atol=0)
    assert other.verdict == bad.verdict == "suspicious"


class Sometimes(nn.Module):
    """Answers with NaN to images that are not plain."""

    def __init__(self, of: nn.Module, plain: Tensor) -> None:
        super().__init__()
        self.of, self.plain = of, {image.numpy().tobytes() for image in plain / 255}

    def forward(self, x: Tensor) -> Tensor:
        known = [image.detach().contiguous().numpy().tobytes() in self.plain for image in x]
        return torch.where(torch.tensor(known)[:, None], self.of(x), x.mean() * torch.nan)


def test_answers_of_nan_to_changed_images_are_no_verdict(tiny: Tiny, pair: Pair) -> None:
    student = Sometimes(pair.bad, pair.clean.images)
    with pytest.raises(ForeshotError, match="audit student: expected finite answers to changed"):
        audit_student(student, tiny.teacher, pair.clean)


def test_sizes_are_those_of_patterns_of_any_scale() -> None:
    patterns = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    for scale in (1e-9, 1.0, 1e25):
        torch.testing.assert_close(size_of(scale * patterns), torch.tensor([scale * 12.5**0.5]))
        torch.testing.assert_close(
            sized(scale * patterns, torch.tensor([12.5**0.5])), patterns, rtol=1e-5, atol=0
        )
    assert torch.equal(sized(0 * patterns, torch.ones(1)), 0 * patterns)


# From files to files ------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `foreshot audit student` in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["foreshot", "audit", "student", *map(str, arguments), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), " ".join(said.out.split()), said.err

    return run


def save(model: Normalized, path: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    save_model(path, model, ARCHITECTURE, (1, SIDE, SIDE), classes)
    return path


def test_exit_codes_and_files(call, tiny: Tiny, pair: Pair, tmp_path: Path) -> None:
    classes = ("a", HOSTILE, "c", "d")
    teacher = save(tiny.teacher, tmp_path / "t.safetensors", classes)
    bad = save(pair.bad, tmp_path / "bad.safetensors", classes)
    good = save(pair.good, tmp_path / "good.safetensors", classes)
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    for number, image in enumerate(pair.clean.images):
        Image.fromarray(image[0].numpy()).save(trusted / f"{number:03}.png")
    (trusted / "no.png").write_bytes(b"none")

    code, said, errors = call(bad, "--teacher", teacher, "--clean", trusted, "--alarm", 0.5)
    assert (code, errors) == (1, "")
    assert "SUSPICIOUS: a change turns the student and not its teacher" in said
    assert "about 50% are called suspicious" in said
    assert "1 files were not read" in said
    verdict = read_json(tmp_path / "audits/bad/verdict.json")
    assert (verdict["verdict"], verdict["suspected_target"]) == ("suspicious", HOSTILE)
    assert verdict["p"] <= verdict["alarm"] == 0.5
    assert verdict["skipped"].keys() == {"no.png"}
    assert verdict["seconds_per_class"] == pytest.approx(sum(verdict["seconds"].values()) / 4)
    assert verdict["classes"][0]["class"] == HOSTILE
    assert sorted(row["index"] for row in verdict["classes"]) == [0, 1, 2, 3]
    assert verdict["classes"][0]["success"]["teacher"] < 0.1
    tensors, about = read_tensors(tmp_path / "audits/bad/changes.safetensors")
    assert tensors["patterns"].shape == (4, 1, SIDE, SIDE)
    assert about["classes"] == list(classes)
    page = (tmp_path / "audits/bad/report.html").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png") == 8

    code, said, _ = call(good, "--teacher", teacher, "--clean", trusted, "--out", "fine")
    assert code == 0
    assert "CLEAN: " in said
    assert read_json(tmp_path / "fine/verdict.json")["suspected_target"] is None
    paths = {"student": good, "teacher": teacher, "clean": trusted}
    told = read_json(tmp_path / "fine/verdict.json")["paths"]
    assert told == {what: str(path) for what, path in paths.items()}
    assert f"<td>{good}</td>" in (tmp_path / "fine/report.html").read_text()
    (tmp_path / "else").mkdir()
    namesake = save(pair.good, tmp_path / "else/bad.safetensors", classes)
    code, _, errors = call(namesake, "--teacher", teacher, "--clean", trusted)
    assert code == 2
    assert f"audits/bad: expected no audit or one of {namesake}, found one of {bad}; " in errors
    assert (tmp_path / "audits/bad/verdict.json").exists()
    again, *_ = call(good, "--teacher", teacher, "--clean", trusted, "--broken", "refuse")
    assert again == 2


def test_bad_files_are_one_sentence(call, tiny: Tiny, pair: Pair, tmp_path: Path) -> None:
    teacher = save(tiny.teacher, tmp_path / "t.safetensors")
    other = save(pair.bad, tmp_path / "o.safetensors", ("a", "b", "c", "d"))
    clean = tmp_path / "clean.safetensors"
    save_images(clean, stripes(20, 3))
    for arguments, wanted in (
        (
            (other, "--teacher", teacher, "--clean", clean),
            "4 classes as the teacher's, found (1, 12, 12) images and 4 classes of other names",
        ),
        (("no.safetensors", "--teacher", teacher, "--clean", clean), "no.safetensors"),
        (
            (clean, "--teacher", teacher, "--clean", clean),
            "--student-architecture says what net",
        ),
        ((teacher, "--teacher", teacher, "--clean", "nowhere"), "nowhere"),
        ((teacher, "--teacher", teacher), "clean"),
    ):
        code, _, errors = call(*arguments)
        assert code == 2
        assert wanted in errors
        assert errors.startswith("foreshot: ")
        assert errors.count("\n") == 1
    assert not (tmp_path / "audits").exists()
