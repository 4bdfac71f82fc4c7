"""The command line: what it prints, where, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer import TyperException

import foreshot.cli
from conftest import DIGITS
from foreshot.attacks import ATTACKS
from foreshot.cli import main
from foreshot.compute import compute
from foreshot.config import Config, load_config, parse, presets
from foreshot.data import DATASETS
from foreshot.defences import DEFENCES
from foreshot.distillation import LOSSES
from foreshot.errors import ForeshotError
from foreshot.files import read_json
from foreshot.models import ARCHITECTURES
from foreshot.triggers import TRIGGERS


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def foreshot_(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Runs the command line in this process, in an empty folder that holds `tiny.yaml`."""
    monkeypatch.setenv("FORESHOT_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(DIGITS)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["foreshot", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


def test_a_run_prints_its_rates_and_its_folder(foreshot_) -> None:
    ended = foreshot_("run", "tiny.yaml", "--device", "cpu")
    assert (ended.code, ended.err) == (0, "")
    folder = Path(re.findall(r"^Run folder: (runs/tiny-[0-9a-f]{8})$", ended.out, re.M)[0])
    metrics = read_json(folder / "metrics.json")
    for rates in (metrics["teacher"], metrics["student"], metrics["controls"]["clean"]):
        assert f"{100 * rates['clean_accuracy']['value']:.1f} [" in ended.out
        assert f"{100 * rates['asr']['value']:.1f} [" in ended.out
    for word in ("student (poisoned)", "control: clean", "did not change", "Wilson", "Poison: 29 "):
        assert word in ended.out
    assert "[teacher] epoch: 1 of " in ended.out
    again = foreshot_("run", "tiny.yaml", "--device", "cpu")
    assert again.code == 0
    assert "[teacher] note: found in the store" in again.out
    assert "epoch" not in again.out
    anew = foreshot_("evaluate", str(folder), "--device", "cpu")
    assert anew.code == 0
    for name in ("teacher", "student", "controls/clean"):
        assert Path(name).name in anew.out
    for rates in (metrics["teacher"], metrics["student"]):
        assert f"{100 * rates['asr']['value']:.1f} [" in anew.out
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    told = foreshot_("report", str(folder), "--device", "cpu")
    assert (told.code, told.out) == (0, f"Report: {folder / 'report.html'}\n")
    assert f"\n{told.out}" in again.out
    assert (folder / "report.html").read_bytes() == page
    assert foreshot_("report", "runs").out == "Report: runs/report.html\n"


def test_the_stages_are_commands(foreshot_, tmp_path: Path) -> None:
    out = ("--device", "cpu", "--out", "here")
    ended = foreshot_("teacher", "tiny.yaml", *out)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.rstrip().endswith("Teacher: here/teacher.safetensors")
    ended = foreshot_("poison", "tiny.yaml", *out, "--teacher", "here/teacher.safetensors")
    assert "Poison: here/poison.safetensors (look at here/poison.png)" in ended.out
    ended = foreshot_("distill", "tiny.yaml", *out, "--poison", "here/poison.safetensors")
    assert ended.code == 0
    assert "Student: here/student.safetensors" in ended.out
    ended = foreshot_("evaluate", "tiny.yaml", "--model", "here/student.safetensors")
    assert ended.code == 0
    assert "robust accuracy" in ended.out
    assert (tmp_path / "here/student.safetensors").is_file()


def test_help_names_every_command_and_every_command_has_an_example(foreshot_) -> None:
    ended = foreshot_("--help")
    assert (ended.code, ended.err) == (0, "")
    commands = ("run", "teacher", "poison", "distill", "evaluate", "sweep", "report", "show")
    for command in commands:
        assert re.search(rf"^\W*{command}\b", ended.out, re.M), command
        help_ = foreshot_(command, "--help")
        assert help_.code == 0
        _, *examples = [line for line in help_.out.splitlines() if f"foreshot {command}" in line]
        assert examples, command  # after the line that says how it is used
        # One that begins within a line has run into the one before.
        assert all(line.startswith(f"  foreshot {command}") for line in examples), command
    version = foreshot_("--version")
    assert (version.code, version.out) == (0, f"foreshot {foreshot.__version__}\n")


def test_a_folder_that_may_not_be_written_to_is_refused_at_once(
    foreshot_, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
    ended = foreshot_("run", "tiny.yaml", "--out", "a/b")
    assert ended.code == 2
    sentence = f"foreshot: a/b: expected a folder to write to, may not write to {Path.cwd()}\n"
    assert ended.err == sentence


def test_list_names_every_member_with_its_summary(foreshot_) -> None:
    ended = foreshot_("list")
    assert (ended.code, ended.err) == (0, "")
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.startswith("  ")}
    for family in (DATASETS, ARCHITECTURES, TRIGGERS, ATTACKS, LOSSES, DEFENCES):
        for name, member in family.items():
            assert lines[name].endswith(member.summary())
    assert presets().keys() <= lines.keys()


@pytest.mark.parametrize("name", ["signs", "digits"])
def test_what_show_prints_is_a_config(name: str, foreshot_) -> None:
    ended = foreshot_("show", name, "--set", "seed=5", "--set", "attack.name=fgsm")
    assert (ended.code, ended.err) == (0, "")
    assert parse(ended.out, "shown") == load_config(name, ["seed=5", "attack.name=fgsm"])
    assert yaml.safe_load(ended.out)["seed"] == 5


def test_the_schema_is_that_of_the_config_with_bare_names(foreshot_) -> None:
    told, own = json.loads(foreshot_("show", "--schema").out), Config.model_json_schema()
    *members, names = told["properties"]["attack"]["oneOf"]
    assert members == own["properties"]["attack"]["oneOf"]
    assert {*names["enum"]} == {*ATTACKS}
    assert told["$defs"]["Pgd"] == own["$defs"]["Pgd"]
    screens = told["$defs"]["Combined"]["properties"]["screens"]["items"]["oneOf"][-1]
    assert "scan" in screens["enum"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "sings"], "sings: expected a preset or a YAML file; did you mean 'signs'?"),
        (["show", "signs", "--set", "seed"], "--set seed: expected KEY=VALUE, such as "),
        (["show", "signs", "--set", "attack.epsilom=3"], "signs: attack.epsilom: no such key; did"),
        (["run", "tiny.yaml", "--out", "tiny.yaml"], "tiny.yaml: expected a folder to write the "),
        (["run", "tiny.yaml", "--out", "."], ".: expected a run folder or an empty one, found oth"),
        (["run", "tiny.yaml", "--out", "/dev/null/x"], "/dev/null/x: expected a folder or no"),
        (["run", "tiny.yaml", "--set", "target=10"], "target: expected 0 to 9 (10 classes), "),
        (["poison", "tiny.yaml", "--teacher", "none"], "none: no such file or directory"),
        (["poison", "tiny.yaml", "--teacher", "tiny.yaml"], "tiny.yaml: expected a whole saf"),
        (["evaluate", "tiny.yaml"], "evaluate: expected a run folder or --model FILE, "),
        (["evaluate", "tiny.yaml", "--model", "none"], "none: "),
        (["run", "x" * 300], "x"),
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "--nonsense"], "No such option: --nonsense"),
        (["run", "--device", "abacus"], "Invalid value for '--device': "),
    ],
)  # fmt: skip
def test_a_users_error_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, foreshot_
) -> None:
    ended = foreshot_(*arguments)
    assert ended.code == 2
    assert ended.err.startswith(f"foreshot: {sentence}")
    assert ended.err.count("\n") == 1
    assert "Traceback" not in ended.err + ended.out
    assert not Path("runs").exists()


def test_bfloat16_is_taken_where_it_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def emulated(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    assert not compute("cuda").bfloat16
    assert compute("cuda", "bfloat16").bfloat16


def test_cuda_is_refused_where_there_is_none(foreshot_, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = foreshot_("run", "tiny.yaml", "--device", "cuda", "--out", "gpu")
    assert ended.code == 2
    assert ended.err.startswith("foreshot: device: expected a CUDA GPU, found none")
    assert not Path("gpu").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "\nInterrupted. Run the same command again to go on.\n"),
        (ForeshotError("a: b"), 2, "foreshot: a: b\n"),
        (PermissionError(13, "Permission denied", "f"), 2, "foreshot: f: permission denied\n"),
        (OSError("odd"), 2, "foreshot: a file: odd\n"),
        (TyperException("usage"), 2, "foreshot: usage\n"),
        (
            SystemExit(1),  # of rich, where nobody reads on
            2,
            "foreshot: standard output: expected a reader, found it closed\n",
        ),
    ],
)
def test_how_it_ends(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(foreshot.cli, "app", fails)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code
    assert capsys.readouterr().err == text


def test_a_bug_shows_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(foreshot.cli, "app", fails)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "in fails" in said


COMMAND = [sys.executable, "-c", "from foreshot.cli import main; main()"]


def test_who_does_not_listen_gets_no_verdict() -> None:
    listing = [*COMMAND, "list"]
    with subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert (process.returncode, said.count("\n")) == (2, 1)
    assert said.startswith("foreshot: standard output: expected a reader")
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *listing], capture_output=True)
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_what_a_terminal_cannot_spell_is_escaped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = [*COMMAND, "show", "n\u00e4h.yaml"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(rb"foreshot: n\xe4h.yaml: expected a preset or a YAML file")


def test_control_c_ends_a_real_run_with_130_and_it_goes_on(tmp_path: Path, foreshot_) -> None:
    environment = {**os.environ, "FORESHOT_HOME": str(tmp_path / "home"), "PYTHONUNBUFFERED": "1"}
    arguments = ["teacher", "tiny.yaml", "--device", "cpu", "--out", "out"]
    arguments += ["--set", "teacher.training.epochs=5000"]
    with subprocess.Popen(
        COMMAND + arguments,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, which the tests may run in, hands down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[teacher] epoch"):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:  # Python loses it in a destructor: one presses again
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\nInterrupted. Run the same command again to go on.\n"
    assert list((tmp_path / "home/store/work").glob("teacher-*/.teacher.safetensors"))
    assert (tmp_path / "out/config.yaml").is_file()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, foreshot.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_of_a_real_process_is_on_stderr_alone(tmp_path: Path) -> None:
    command = [*COMMAND, "show", "sings"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "foreshot: sings: expected a preset or a YAML file; did you mean 'signs'?\n"
    )
