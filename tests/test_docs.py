"""What the documentation shows is run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("path", HOW_TO)
def test_each_how_to_is_a_program_that_holds_what_it_says(path: Path, at: dict[str, str]) -> None:
    assert f'--8<-- "howto/{path.name}"' in path.with_suffix(".md").read_text(encoding="utf-8")
    ran([sys.executable, str(path)], at)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, at: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(block for kind, block in BLOCK.findall(text) if kind == "python")
    ran([sys.executable, "-c", code], at)


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
