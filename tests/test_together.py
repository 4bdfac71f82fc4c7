"""Several processes that train one network: the same gradients, the same bits again, one result."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conftest import DIGITS, stripes
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.files import file_digest, read_json, read_tensors, write_tensors
from foreshot.together import agree, share
from foreshot.training import Samples, Supervised, Training, fit

ROOT = Path(__file__).parent.parent
ODD = 75
"""Images: with batches of 16 the last one has 11, which two cannot share evenly."""


def trained(*norm: nn.Module, batch: int = 16) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A network that is trained; without BatchNorm no gradient depends on how a batch is shared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), *norm, nn.Tanh(), nn.Linear(16, 4))
    data, told = stripes(ODD, 0), []
    assert data.labels is not None
    samples = Samples(data.images, {"y": data.labels}, weights=torch.linspace(0.5, 1, ODD))
    schedule = Training(epochs=3, batch=batch, lr=0.1, augment="crop_flip")

    def listen(event: Any) -> None:
        if event.kind == "epoch":
            told.append(event.values["loss"])

    fit(Supervised(model), samples, schedule, CPU, seed=1, stage="student", listener=listen)
    return dict(model.state_dict()), told


def along(rank: int, folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert agree({"rank": rank}) == {"rank": 0}
    assert share(torch.arange(5)).tolist() == [[0, 2, 4], [1, 3]][rank]
    assert CPU.describe()["processes"] == 2
    weights, told = trained()
    write_tensors(folder / f"{rank}.safetensors", weights, {"told": told})
    normed, _ = trained(nn.BatchNorm1d(16))
    write_tensors(folder / f"normed-{rank}.safetensors", normed, {})
    with pytest.raises(ForeshotError, match="expected batches of two images or more for each of 2"):
        trained(batch=3)
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=along, args=(n, tmp_path)) for n in (0, 1)]
    for process in processes:
        process.start()
    alone, told = trained()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (first, about), (second, other) = (read_tensors(tmp_path / f"{n}.safetensors") for n in (0, 1))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6)
    assert about["told"] == other["told"] == pytest.approx(told, abs=1e-6)
    assert "processes" not in CPU.describe()
    one, other = (read_tensors(tmp_path / f"normed-{n}.safetensors")[0] for n in (0, 1))
    assert "2.running_mean" in one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def torchrun(folder: Path, home: Path) -> subprocess.Popen[str]:
    """`foreshot run` in two processes, of a config whose student asks the teacher of every view."""
    (folder / "tiny.yaml").write_text(DIGITS.replace("epochs: 1", "epochs: 2, augment: crop"))
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m foreshot run tiny.yaml"
    return subprocess.Popen(
        [sys.executable, *command.split(), "--out", "out", "--device", "cpu"],
        cwd=folder,
        env=os.environ | {"FORESHOT_HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(out: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(out.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("together")
    process = torchrun(folder, folder / "home")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder / "said").write_text(out)
    return folder


def test_one_run_of_two_processes_is_one_run(both: Path) -> None:
    manifest, said = read_json(both / "out" / "manifest.json"), (both / "said").read_text()
    assert manifest["processes"] == 2
    assert said.count("Run folder: out") == said.count("[teacher] end") == 1
    events = [json.loads(line) for line in (both / "out" / "events.jsonl").read_text().splitlines()]
    assert sum(e["kind"] == "epoch" and e["stage"] == "student" for e in events) == 2
    assert read_json(both / "out" / "metrics.json")["teacher"]["clean_accuracy"]["value"] > 0.5
    assert list((both / "home" / "store" / "work").iterdir()) == []
    kept = (both / "home" / "store").glob("student/*/done.json")
    assert [read_json(path)["inputs"]["processes"] for path in kept] == [2, 2]


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_goes_on_to_the_same_bits(
    both: Path, tmp_path: Path
) -> None:
    for victim in (0, 1):
        process = torchrun(tmp_path, tmp_path / "home")
        state = "work/student-*/.student.safetensors" if victim else "work/teacher-*/.teacher*"
        while not list((tmp_path / "home" / "store").glob(state)):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        listed = ["pgrep", "-f", "-P", str(process.pid), "foreshot"]
        ranks = subprocess.check_output(listed, text=True).split()
        os.kill(int(ranks[victim]), signal.SIGKILL)
        process.communicate(timeout=120)
        assert process.returncode != 0
    process = torchrun(tmp_path, tmp_path / "home")
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert weights(tmp_path / "out") == weights(both / "out")


@pytest.mark.slow
def test_ray_train_gives_the_same_bits(both: Path, tmp_path: Path) -> None:
    script = ROOT / "docs" / "howto" / "ray_train.py"
    (tmp_path / "tiny.yaml").write_text((both / "tiny.yaml").read_text())
    subprocess.run(
        [sys.executable, script, "tiny.yaml", tmp_path / "out", "2"],
        cwd=tmp_path,
        env=os.environ | {"FORESHOT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    assert weights(tmp_path / "out") == weights(both / "out")


def test_a_sweep_is_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from foreshot.sweep import Job, load_sweep

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ForeshotError, match="sweep: expected one process, found several"):
        Job(load_sweep("signs", ["seed=0:2"]))
