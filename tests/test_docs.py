"""What the documentation shows is run as it stands there."""

import os
import re
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from runpy import run_path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SLOW = ("ray_train",)
HOW_TO = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [], id=path.stem)
    for path in sorted((DOCS / "howto").glob("*.py"))
]
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.S)
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    if page.stem != "tutorial" and "```python" in page.read_text(encoding="utf-8")
]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty folder to work in, and the environment of its commands."""
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"FORESHOT_HOME": str(tmp_path / "home"), "PATH": path}


def ran(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def as_main(program: Path) -> None:
    sys.argv = [str(program)]
    run_path(str(program), run_name="__main__")


def forked(program: Path) -> None:
    """Runs a program in a process of its own, which need not import everything once more.

    What it forgets to import, and these tests do not, it misses all the same.
    """
    process = get_context("fork").Process(target=as_main, args=(program,))
    process.start()
    process.join(600)
    process.kill()
    assert process.exitcode == 0


@pytest.fixture
def home(
    at: dict[str, str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one page has trained, another one finds."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    monkeypatch.setenv("FORESHOT_HOME", str(root / "docs"))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("path", HOW_TO)
def test_each_how_to_is_a_program_that_holds_what_it_says(path: Path) -> None:
    assert f'--8<-- "howto/{path.name}"' in path.with_suffix(".md").read_text(encoding="utf-8")
    forked(path)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    text, program = page.read_text(encoding="utf-8"), Path("page.py")
    blocks = [block for kind, block in BLOCK.findall(text) if kind == "python"]
    program.write_text("\n".join(blocks), encoding="utf-8")
    forked(program)


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(at: dict[str, str], tmp_path: Path) -> None:
    from foreshot.files import read_json

    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    for kind, block in BLOCK.findall(text):
        ran([sys.executable, "-c", block] if kind == "python" else ["bash", "-e", "-c", block], at)
    verdicts = {
        name: read_json(tmp_path / "audits" / name / "verdict.json")["verdict"]
        for name in ("arrived", "harmless")
    }
    assert verdicts == {"arrived": "suspicious", "harmless": "clean"}
    attacked, defended = (
        read_json(tmp_path / "runs" / name / "metrics.json") for name in ("tutorial", "defended")
    )
    assert attacked["student"]["asr"]["value"] > 0.8 > 0.1 > defended["student"]["asr"]["value"]
