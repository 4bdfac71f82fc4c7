"""The page of several runs: its table, its plots, and what a real browser makes of them."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from conftest import Page
from foreshot.config import dump, load_config
from foreshot.errors import ForeshotError
from foreshot.files import file_digest, read_json, write_json
from foreshot.metrics import wilson
from foreshot.report import MANIFEST, charts, write_report
from foreshot.report.page import named
from foreshot.report.settings import ABSENT, varying

HOSTILE = "<img src=x onerror=alert(1)> ]]> \" '"
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


def rate(hits: int, total: int = 1000) -> dict[str, Any]:
    low, high = wilson(hits, total)
    return {"value": hits / total, "hits": hits, "total": total, "low": low, "high": high}


def put(folder: Path, asr: int, *settings: str, accuracy: int = 900, **more: Any) -> Path:
    """A finished run's folder, without models that work: the page of several asks none."""
    folder.mkdir(parents=True)
    student = {"clean_accuracy": rate(accuracy), "asr": rate(asr), "asr_net": asr / 1000 - 0.01}
    clean = {"clean_accuracy": rate(910), "asr": rate(10), "asr_net": 0.0}
    metrics = {
        "schema": 1,
        "split": "test",
        "teacher": {"clean_accuracy": rate(950), "asr": rate(5)},
        "student": student,
        "controls": {"clean": clean},
        "poison": {},
        "seconds": {"total": 90.0},
        **more,
    }
    write_json(folder / "metrics.json", metrics)
    (folder / "config.yaml").write_text(dump(load_config("signs", settings)))
    (folder / "teacher.safetensors").write_bytes(b"")
    names = ("metrics.json", "config.yaml", "teacher.safetensors")
    outputs = {name: file_digest(folder / name) for name in names}
    about = {part: {} for part in MANIFEST}
    write_json(folder / "manifest.json", {"schema": 1, "outputs": outputs, **about})
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> list[Path]:
    """Three rates and two attacks, two seeds each; and a run that is not finished."""
    root, folders = tmp_path / "sweep", []
    for seed in (0, 1):
        for share, asr in ((0.01, 200), (0.05, 900), (0.002, 50)):
            settings = (f"attack.rate={share}", f"seed={seed}")
            folders.append(put(root / f"rate-{share}-{seed}", asr + 25 * seed, *settings))
        settings = ("attack.name=fgsm", f"seed={seed}", "defence.name=strip")
        folders.append(put(root / f"fgsm-{seed}", 100 + seed, *settings, defence={"auroc": 0.75}))
    (root / "open").mkdir()
    (root / "open" / "config.yaml").write_text(dump(load_config("signs")))
    return [*folders, root / "open"]


def text_of(part: str) -> str:
    return " ".join(html.unescape(re.sub("<.*?>", "", part)).split())


def table(page: str) -> tuple[list[str], list[list[str]]]:
    """The headings, and what stands in the rows."""
    heads = [text_of(head) for head in re.findall("<th.*?</th>", page)]
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall("<tr.*?</tr>", body, re.DOTALL)
    return heads, [[text_of(cell) for cell in re.findall("<td.*?</td>", row)] for row in rows]


# What it says ------------------------------------------------------------------------------------


def test_the_table_holds_what_differs_and_what_was_measured(
    sweep: list[Path], tmp_path: Path
) -> None:
    page = write_report(sweep, tmp_path / "page.html").read_text("utf-8")
    heads, rows = table(page)
    assert heads == [
        "run", "seed", "attack.rate", "attack", "defence",
        "ASR, %", "clean accuracy, %", "net ASR", "clean student: ASR", "teacher: ASR",
        "teacher: accuracy", "defence: AUROC", "minutes",
    ]  # fmt: skip
    assert len(rows) == 8
    assert rows[1] == [
        "rate-0.05-0", "0", "0.05", "counterfactual", "none",
        "90.0 [88.0, 91.7]", "90.0 [88.0, 91.7]", "+89.0", "1.0 [0.5, 1.8]", "0.5 [0.2, 1.2]",
        "95.0 [93.5, 96.2]", "–", "1.5",
    ]  # fmt: skip
    assert (rows[3][0], rows[3][4], rows[3][11]) == ("fgsm-0", "strip", "0.750")
    assert "call 5.0 to 92.5 % of stamped images the target" in page
    assert "their clean accuracy is 90.0 to 90.0 %" in page
    assert re.findall("not in the table: (.*?)</p>", page) == [f"{named(str(sweep[-1]))}."]


def test_settings_that_a_name_implies_are_left_out() -> None:
    configs = [load_config("signs", [f"attack.name={name}"]) for name in ("pgd", "cw", "fgsm")]
    assert list(varying(configs)) == ["attack.name"]
    steps = load_config("signs", ["attack.name=pgd", "attack.steps=7"])
    assert varying([*configs, steps])["attack.steps"] == [
        *(getattr(config.attack, "steps", ABSENT) for config in configs),
        7,
    ]
    nothing, own = load_config("signs"), load_config("signs", ["surrogate={data: disjoint}"])
    assert varying([nothing, own]) == {"surrogate": [None, "yes"]}
    assert varying([nothing, nothing]) == {}


def test_curves_are_means_over_seeds(
    sweep: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(charts, "against", lambda *told: drawn.append(told) or "")
    write_report(sweep, tmp_path / "page.html")
    # fgsm was run at one rate alone: no line.
    expected = [(0.002, [5.0, 7.5]), (0.01, [20.0, 22.5]), (0.05, [90.0, 92.5])]
    assert drawn == [
        ("attack.rate", {"": expected}, {"": [(at, [90.0, 90.0]) for at, _ in expected]})
    ]


def test_maps_are_means_over_the_runs_of_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(charts, "heat", lambda *told: drawn.append(told) or "")
    folders, measured = [], {("pgd", "null"): [600, 640, 620], ("pgd", "strip"): [100]}
    measured[("fgsm", "null")] = [200]
    for (attack, defence), rates in measured.items():
        for seed, asr in enumerate(rates):
            settings = [f"attack.name={attack}", f"seed={seed}"]
            settings += [] if defence == "null" else [f"defence.name={defence}"]
            folders.append(put(tmp_path / f"{attack}-{defence}-{seed}", asr, *settings))
    write_report(folders, tmp_path / "page.html")
    ((rows, columns, shares, texts, sides),) = drawn
    assert (rows, columns, sides) == (["pgd", "fgsm"], ["none", "strip"], ("attack", "defence"))
    assert shares[0] == [mean((60.0, 64.0, 62.0)), 10.0]
    assert shares[1][0] == 20.0
    assert shares[1][1] != shares[1][1]
    assert texts == [["62\n60 to 64\nacc. 90", "10\nacc. 90"], ["20\nacc. 90", "not\nmeasured"]]
    # Two settings that only vary together are no table of two.
    drawn.clear()
    write_report([folders[0], folders[3]], tmp_path / "page.html")
    assert drawn == []


def test_plots_say_what_is_plotted_and_do_not_read_names_as_formulas(tmp_path: Path) -> None:
    svg = charts.heat([HOSTILE, "$x^2$"], ["a"], [[10.0], [20.0]], [["1"], ["2"]], ("<b>", "c"))
    page = Page(svg)
    assert not {"img", "b", "script", "image", "a"} & {tag for tag, _ in page.tags}
    assert "$x^2$" in svg
    assert html.escape(HOSTILE, quote=False) in svg.replace("&quot;", '"').replace("&#39;", "'")
    assert "currentColor" in svg
    assert charts.INK not in svg
    again = charts.heat([HOSTILE, "$x^2$"], ["a"], [[10.0], [20.0]], [["1"], ["2"]], ("<b>", "c"))
    assert again == svg
    assert len(re.findall("<svg", svg)) == 1


def test_what_is_no_run_is_refused(sweep: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(ForeshotError, match="expected finished runs, found 2 that are not"):
        write_report([sweep[-1], sweep[-1]], out)
    with pytest.raises(ForeshotError, match="expected a run folder, or a folder of runs, found n"):
        write_report([sweep[0], tmp_path / "nowhere"], out)
    (sweep[0] / "metrics.json").write_text("{}")
    with pytest.raises(ForeshotError, match=r"metrics\.json: expected SHA-256"):
        write_report(sweep, out)
    assert not out.exists()


def test_a_run_with_parts_missing_is_refused(sweep: list[Path], tmp_path: Path) -> None:
    missing = ((sweep[0], "metrics.json", "poison"), (sweep[1], "manifest.json", "command"))
    for run, name, part in missing:
        content = read_json(run / name)
        del content[part]
        write_json(run / name, content)
        manifest = read_json(run / "manifest.json")
        manifest["outputs"]["metrics.json"] = file_digest(run / "metrics.json")
        write_json(run / "manifest.json", manifest)
        with pytest.raises(ForeshotError, match=f"{name}: expected .*, found no {part}"):
            write_report([run, sweep[2]], tmp_path / "page.html")


def test_runs_in_a_folder_whose_name_is_no_text(sweep: list[Path], tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff"))
    shutil.copytree(sweep[1], odd)
    (odd / "report.html").write_text("a page")
    page = write_report([odd, sweep[2]], tmp_path / "page.html")
    assert "c%FF/report.html" in page.read_text("utf-8")


def test_a_folder_of_runs_stands_for_them(sweep: list[Path], tmp_path: Path) -> None:
    page = write_report([sweep[0].parent])
    assert page == sweep[0].parent / "report.html"
    whole, named = (
        table(path.read_text("utf-8")) for path in (page, write_report(sweep, tmp_path / "x"))
    )
    assert whole[0] == named[0]
    assert sorted(whole[1]) == sorted(named[1])


# In a browser ------------------------------------------------------------------------------------


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """The DOM that a page ends as, and what its console said; `script` is run in it at the end."""

    def go(page: Path, script: str = "") -> tuple[str, list[str]]:
        text = page.read_text("utf-8")
        if script:
            digest = base64.b64encode(sha256(script.encode()).digest()).decode()
            text = text.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
            text = text.replace("</body>", f"<script>{script}</script></body>")
        driven = tmp_path / "driven.html"
        driven.write_text(text, "utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
        ended = subprocess.run(
            [*command, driven.as_uri()], capture_output=True, text=True, check=True, timeout=120
        )
        return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]

    return go


@pytest.fixture
def page(sweep: list[Path], tmp_path: Path) -> Path:
    odd = put(
        sweep[0].parent / HOSTILE, 500, f"data={json.dumps({'name': 'folder', 'root': '<b>'})}"
    )
    (odd / "report.html").write_text("its own")
    return write_report([*sweep, odd], tmp_path / "page.html")


@needs_chromium
def test_it_sorts_and_filters(page: Path, browse: Callable[..., tuple[str, list[str]]]) -> None:
    dom, console = browse(page)
    assert console == []
    assert '<p class="tools">' in dom  # the page's own script was let through
    order = [row[0] for row in table(dom)[1]]
    assert order[:2] == ["rate-0.01-0", "rate-0.05-0"]

    def click(column: str, times: int) -> list[list[str]]:
        at = table(dom)[0].index(column)
        press = f"document.querySelectorAll('th button')[{at}].click();"
        after, console = browse(page, press * times)
        assert console == []
        found = table(after)[1]
        assert sorted(row[0] for row in found) == sorted(order)
        way = "ascending" if times == 1 else "descending"
        assert re.findall(f'aria-sort="{way}".*?</th>', after)
        return [[row[0], row[at]] for row in found]

    rising = [float(text.split()[0]) for _, text in click("ASR, %", 1)]
    assert rising == sorted(rising) == [5, 7.5, 10, 10.1, 20, 22.5, 50, 90, 92.5]
    falling = [float(text.split()[0]) for _, text in click("ASR, %", 2)]
    assert falling == rising[::-1]
    # Numbers by value, and before what has none.
    assert [text for _, text in click("defence: AUROC", 1)] == ["0.750"] * 2 + ["–"] * 7

    ask = "const field = document.querySelector('input'); field.value = 'RATE=0.05 seed=1';"
    after, console = browse(page, f"{ask} field.dispatchEvent(new Event('input'));")
    assert console == []
    shown = [
        row for row in re.findall("<tr data-text.*?</tr>", after) if 'hidden=""' not in row[:400]
    ]
    assert [text_of(re.findall("<td.*?</td>", row)[0]) for row in shown] == [
        "rate-0.05-1", "fgsm-1",
    ]  # fmt: skip
    assert "<output>2</output>" in after


@needs_chromium
def test_names_are_text_and_nothing_is_asked_for(
    page: Path, tmp_path: Path, browse: Callable[..., tuple[str, list[str]]]
) -> None:
    text = page.read_text("utf-8")
    found = Page(text)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 1
    assert not {"img", "iframe", "object", "embed", "link", "base", "form", "b"} & set(tags)
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert len(links) == 1
    assert str(links[0]).startswith("sweep/%3Cimg%20src%3Dx%20onerror")
    assert not any(name.startswith("on") for _, given in found.tags for name in given)
    # That the browser would complain, if a page did ask for something: else this says nothing.
    naive = tmp_path / "naive.html"
    naive.write_text(text.replace("</body>", "<img src=http://127.0.0.1:9/x></body>"), "utf-8")
    _, console = browse(naive)
    assert any("Content Security Policy" in line for line in console)
    _, console = browse(page)
    assert console == []
