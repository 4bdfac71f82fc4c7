"""The page of one run: true to its files, whole in itself, and deaf to what names say."""

import html
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Page, Rule, stripes
from foreshot.cli import main
from foreshot.compute import CPU
from foreshot.config import Config, load_config, parse
from foreshot.data.base import ImageSet
from foreshot.data.tensor import save_images
from foreshot.errors import ForeshotError
from foreshot.experiment import run
from foreshot.files import read_json
from foreshot.record import load_run
from foreshot.report import charts, images, one, write_report
from foreshot.report.settings import command, differences, leaves, nearest_preset
from foreshot.triggers import Patch
from foreshot.triggers.base import stamp_uint8

HOSTILE = "<script>document.title='owned'</script>"
NAMES = (HOSTILE, "\"'&quot; ]]> -->", "{{ 7 * 7 }}$x^2$\x1b[31m", "<img src=x onerror=alert(1)>")
TEXT = """
precision: float32
teacher:
  model: {name: resnet, depth: 8, width: 0.5, stem_stride: 2}
  training: {epochs: 2, batch: 40}
trigger: {name: patch, size: 2}
target: 1
attack: {name: pgd, rate: 0.05, epsilon: 32, steps: 2, retries: 0}
student:
  model: {name: resnet, depth: 8, width: 0.5, stem_stride: 2}
  training: {epochs: 2, batch: 40}
controls: [clean]
"""


@dataclass(frozen=True)
class Done:
    """A finished run with hostile names, and its page as the run wrote it."""

    out: Path
    home: Path
    data: Path
    config: Config
    page: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root = tmp_path_factory.mktemp("hostile")
    data = root / "<b>bold"
    data.mkdir()
    for name, count in (("train", 200), ("test", 120)):
        plain = stripes(count, count)
        save_images(data / f"{name}.st", ImageSet(plain.images, plain.labels, NAMES))
    paths = {"path": f"{data}/train.st", "test_path": f"{data}/test.st"}
    config = parse(f"{TEXT}data: {json.dumps({'name': 'tensor', **paths})}", "test")
    out = root / "<i>run"
    run(config, out, store=root / "home/store", device="cpu")
    return Done(out, root / "home", data, config, (out / "report.html").read_text("utf-8"))


@pytest.fixture
def copied(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, to be changed."""
    monkeypatch.setenv("FORESHOT_HOME", str(done.home))
    return Path(shutil.copytree(done.out, tmp_path / "<i>run"))


def cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the table that follows a heading, tags taken away."""
    table = page.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    rows = re.findall("<tr.*?</tr>", table, re.DOTALL)
    return [
        [" ".join(html.unescape(re.sub("<.*?>", "", cell)).split()) for cell in found]
        for row in rows
        if (found := re.findall("<t[dh].*?</t[dh]>", row, re.DOTALL))
    ]


# What it says ------------------------------------------------------------------------------------


def percent(rate: dict[str, Any]) -> str:
    return f"{100 * rate['value']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def test_the_rates_are_those_of_the_metrics(done: Done) -> None:
    metrics = read_json(done.out / "metrics.json")
    models = {
        "teacher": metrics["teacher"],
        "student (poisoned)": metrics["student"],
        "control: clean": metrics["controls"]["clean"],
    }
    expected = [["model", "clean accuracy", "ASR", "net ASR", "robust accuracy"]]
    for name, rates in models.items():
        net = rates.get("asr_net")
        expected.append(
            [
                name,
                percent(rates["clean_accuracy"]),
                percent(rates["asr"]),
                "" if net is None else f"{100 * net:+.1f}",
                percent(rates["robust_accuracy"]),
            ]
        )
    assert cells(done.page, "Rates") == expected
    heading = html.unescape(re.findall("<h1>(.*?)</h1>", done.page)[0])
    for rates in models.values():
        assert f"{100 * rates['asr']['value']:.1f}%" in heading
    stealth = dict(cells(done.page, "Stealth"))
    assert stealth["linf_255"] == str(metrics["poison"]["linf_255"])
    assert float(stealth["ssim"]) == pytest.approx(metrics["poison"]["ssim"], rel=1e-3)
    cost = dict(cells(done.page, "Cost"))
    assert cost.keys() == metrics["seconds"].keys()
    assert cost["total"] == f"{metrics['seconds']['total']:.1f} s"


def test_the_config_is_whole_and_what_differs_is_marked(done: Done) -> None:
    preset, base = nearest_preset(done.config)
    theirs, mine = leaves(base), leaves(done.config)
    rows = cells(done.page, "Config")
    assert [row[0] for row in rows] == list(mine)
    for key, value, other in rows:
        written = mine[key] if isinstance(mine[key], str) else json.dumps(mine[key])
        assert value == ("none" if mine[key] is None else " ".join(written.split()))
        assert bool(other) == (key not in theirs or theirs[key] != mine[key])
    assert ["target", "1", f"{preset}: {theirs['target']}"] in rows


def test_the_curves_are_those_that_were_told(copied: Path) -> None:
    lines = (copied / "events.jsonl").read_text().splitlines()
    epochs = [event for line in lines if (event := json.loads(line))["kind"] == "epoch"]
    students = ["student", "control: clean"]
    named = {"loss": ["teacher", *students], "ASR": students, "clean accuracy": students}
    for key, stages in named.items():
        curves = one.told(load_run(copied), key)
        assert list(curves) == stages
        for stage, curve in curves.items():
            told = [event["values"][key] for event in epochs if event["stage"] == stage]
            assert curve == list(enumerate(told, 1))
    # What an interrupted run tells twice counts once, and half a line not at all.
    again = {**epochs[0], "values": {"loss": 7.5}}
    odd = ["[]", '{"kind": "epoch"}', '{"kind": "epoch", "done": "x"}', '{"kind": "ep']
    (copied / "events.jsonl").write_text("\n".join([*lines, json.dumps(again), *odd]))
    assert one.told(load_run(copied), "loss")["teacher"][0] == (1, 7.5)
    (copied / "events.jsonl").unlink()
    assert "found in the store" in write_report([copied], device="cpu").read_text("utf-8")


def test_the_last_point_of_a_curve_is_what_the_run_measured(done: Done) -> None:
    """The test split is smaller than the sample, so that both are of the same images."""
    run = load_run(done.out)
    for stage, block in (
        ("student", run.metrics["student"]),
        ("control: clean", run.metrics["controls"]["clean"]),
    ):
        for key, name in (("ASR", "asr"), ("clean accuracy", "clean_accuracy")):
            assert one.told(run, key)[stage][-1][1] == pytest.approx(100 * block[name]["value"])


def test_confusion_counts_what_the_student_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By formula: it says a class by the brightness of the first pixel."""
    drawn: list[Any] = []
    monkeypatch.setattr(charts, "heat", lambda *told, **_: drawn.extend(told))
    first = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 3, 3])
    levels = (first * 10).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    student = Rule(lambda x: -(x[:, 0, :1, 0] * 255 - torch.arange(4) * 10).abs())
    test = ImageSet(levels, labels, ("a", "b", "c", "d"))
    images.confusion(student, test, Patch(size=2), 1, CPU)
    rows, columns, shares, texts, _ = drawn
    assert rows == ["a", "c", "d"]
    assert columns == ["a", "c", "d", "b (target)", "others"]
    expected = [[75, 0, 0, 25, 0], [0, 100, 0, 0, 0], [0, 50, 50, 0, 0]]
    assert torch.tensor(shares).allclose(torch.tensor(expected).float())
    assert texts == [["75", "", "", "25", ""], ["", "100", "", "", ""], ["", "50", "50", "", ""]]


def test_the_answers_are_those_of_the_models(done: Done) -> None:
    """Asked anew, from the files alone."""
    loaded, test = load_run(done.out), done.config.data.load(Path()).test
    assert test.labels is not None
    other = (test.labels != 1).nonzero()[:, 0]
    chosen = other[torch.linspace(0, len(other) - 1, images.ASKED).long()]
    stamped = stamp_uint8(loaded.trigger, test.images[chosen]).float() / 255
    assert loaded.student is not None
    models = {
        "teacher": loaded.teacher,
        "clean student": loaded.controls["clean"],
        "poisoned student": loaded.student,
    }
    cards = re.findall('<li class="asked">(.*?)</li>', done.page, re.DOTALL)
    assert len(cards) == images.ASKED
    for name, model in models.items():
        with torch.no_grad():
            shares, said = model(stamped).softmax(1).max(1)
        for card, label, number, share in zip(
            cards, test.labels[chosen], said, shares, strict=True
        ):
            kind, text = re.findall(f'{name}:</span> <span class="(.*?)">(.*?)</span>', card)[0]
            assert kind == ("hit" if number == 1 else "right" if number == label else "wrong")
            assert text.endswith(f"{100 * share:.0f}&nbsp;%")


# How to do it again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("signs", ()),
        ("signs", ("seed=7", "attack.rate=0.01")),
        ("signs", ("attack.name=fgsm", "defence.name=combined", "student.model.name=vit")),
        ("signs", ("compression.name=prune", "trigger.name=blend", "controls=[]")),
        ("digits", ("distillation.terms.0.loss.name=dkd", "validation=0.2", "surrogate={}")),
        ("folder", ('data.root=it\'s "here" $HOME; `x` {}',)),
    ],
)
def test_the_command_comes_to_the_same_config(preset: str, settings: tuple[str, ...]) -> None:
    config = load_config(preset, settings)
    nearest, base = nearest_preset(config)
    assert nearest == preset
    told = command(config, nearest)
    assert told is not None
    assert told.isprintable()
    words = shlex.split(told)
    assert words[:3] == ["foreshot", "run", preset]
    assert set(words[3::2]) <= {"--set"}
    assert load_config(preset, words[4::2]) == config
    assert bool(differences(config, base)) == bool(settings)


def test_a_config_that_no_setting_comes_to_has_no_command() -> None:
    terms = [{"loss": {"name": "kd"}}, {"loss": {"name": "at"}, "at": [["layer1", "layer1"]]}]
    config = load_config("signs", [f"distillation.terms={json.dumps(terms)}"])
    assert command(config, "signs") is None


# Whole in itself, and harmless -------------------------------------------------------------------


def test_names_are_text_and_nothing_is_loaded(done: Done) -> None:
    page = Page(done.page)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "a", "b", "i"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or str(attributes["src"]).startswith("data:image/png;base64,")
        for name in ("href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith("#")
    assert set(re.findall(r"https?://[^\s\"'<>]*", done.page)) <= {
        "http://www.w3.org/2000/svg",  # names of XML, which nobody loads
        "http://www.w3.org/1999/xlink",
    }
    assert not re.findall(r"url\((?!#)", done.page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in done.page
    assert len(done.page) < 3_000_000
    assert html.escape(HOSTILE, quote=False) in done.page.replace("&#39;", "'")
    assert r"{{ 7 * 7 }}$x^2$\x1b[31m" in done.page
    assert "\x1b" not in done.page
    assert "&lt;b&gt;bold" in done.page
    assert "run &lt;i&gt;run" in done.page


def test_the_same_run_gives_the_same_bytes(done: Done, copied: Path, tmp_path: Path) -> None:
    page = write_report([copied], device="cpu")
    assert page == copied / "report.html"
    assert page.read_text("utf-8") == done.page
    elsewhere = tmp_path / "elsewhere.html"
    assert write_report([str(copied)], elsewhere) == elsewhere
    assert elsewhere.read_text("utf-8") == done.page


def test_the_page_is_no_part_of_what_the_manifest_vouches_for(done: Done, copied: Path) -> None:
    assert "report.html" not in read_json(copied / "manifest.json")["outputs"]
    (copied / "report.html").write_text("changed")
    load_run(copied)
    run(done.config, copied, store=done.home / "store", device="cpu")
    assert "<h2>Rates</h2>" in (copied / "report.html").read_text("utf-8")


# When something is missing -----------------------------------------------------------------------


def told(page: str) -> str:
    return html.unescape(re.findall("are left out: (.*?)</p>", page)[0])


def test_without_its_data_a_run_still_has_a_page(done: Done, copied: Path) -> None:
    whole = len(re.findall("<img", done.page))
    (done.data / "test.st").rename(done.data / "away")
    try:
        page = write_report([copied], device="cpu").read_text("utf-8")
        assert "test.st: expected a safetensors file" in told(page)
        assert cells(page, "Rates") == cells(done.page, "Rates")
        # What the run has drawn itself: poison.png and trigger.png.
        assert len(re.findall("<img", page)) == 2 < whole
        save_images(done.data / "test.st", stripes(40, 3))
        page = write_report([copied], device="cpu").read_text("utf-8")
        assert "expected the classes" in told(page)
        other = stripes(40, 3)
        save_images(done.data / "test.st", ImageSet(other.images, other.labels, NAMES))
        page = write_report([copied], device="cpu").read_text("utf-8")
        assert told(page) == "the dataset is not the one that the run had."
    finally:
        (done.data / "away").rename(done.data / "test.st")


@pytest.mark.parametrize("name", ["metrics.json", "student.safetensors", "config.yaml"])
def test_a_changed_file_is_one_sentence(
    name: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((copied / name).read_bytes())
    data[-5] ^= 1
    (copied / name).write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["foreshot", "report", str(copied)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert re.fullmatch(
        rf"foreshot: .*{name}: expected SHA-256 \w+, found \w+\n", capsys.readouterr().err
    )


def test_a_run_that_stopped_before_its_metrics_is_refused(copied: Path) -> None:
    manifest = read_json(copied / "manifest.json")
    del manifest["outputs"]["metrics.json"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    (copied / "metrics.json").unlink()
    with pytest.raises(ForeshotError, match="expected a run with metrics of schema 1, found none"):
        write_report([copied])
