"""What holds on a CPU holds on a GPU: every method runs there, within its bounds, to the same bits.

Skipped where there is no GPU.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ARCHITECTURE, DIGITS, Tiny, stripes, trained
from foreshot.attacks import ATTACKS, Pgd, crafting
from foreshot.audit.student import audit_student
from foreshot.compression import COMPRESSIONS
from foreshot.compromises import COMPROMISES
from foreshot.compute import CPU, Compute, compute
from foreshot.config import Config, parse
from foreshot.defences import DEFENCES
from foreshot.distillation import LOSSES
from foreshot.experiment import run
from foreshot.files import file_digest, read_tensors
from foreshot.inference import place
from foreshot.metrics import evaluate
from foreshot.models import build
from foreshot.models.checkpoint import state_digest
from foreshot.progress import Event
from foreshot.training import Samples, Supervised, Training, fit
from foreshot.triggers import TRIGGERS
from foreshot.views import AttackerView
from test_claims import methods
from test_contract import check, quick

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Compute:
    return compute("cuda", request.param)


def there(tiny: Tiny, engine: Compute, **parameters: Any) -> AttackerView:
    """What an attacker knows of the small problem, with the teacher on the GPU."""
    teacher = place(deepcopy(tiny.teacher), engine)
    known = tiny.train.images, teacher, tiny.trigger, tiny.target
    return AttackerView(*known, seed=0, compute=engine, **parameters)


@pytest.mark.parametrize("key", ATTACKS)
def test_poison_is_within_epsilon_and_the_same_again(
    key: str, engine: Compute, tiny: Tiny, keep_rng: None
) -> None:
    attack, view = quick(key), there(tiny, engine)
    poison = attack.craft(view)
    check(poison, attack, view)
    assert attack.craft(view).digest == poison.digest


def test_poison_does_not_depend_on_which_images_are_crafted_together(
    engine: Compute, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole chunks of 64, and parts of them."""
    monkeypatch.setattr(crafting, "ON_GPU", 64)
    attack = Pgd(steps=5, retries=0, direction="gradient", random_start=False)
    bases = torch.arange(150)
    whole = attack.craft(there(tiny, engine, bases=bases))
    part = attack.craft(there(tiny, engine, bases=bases[7:110]))
    assert torch.equal(whole.images[7:110], part.images)


def taught(engine: Compute, checkpoint: Path | None = None, stop: int | None = None) -> str:
    """The digest of a network that is trained; after epoch `stop`, if given, it is killed."""
    data = stripes(400, 0)
    assert data.labels is not None
    model = build(ARCHITECTURE, data.images, len(data.classes), 0, "teacher")
    ended = 0

    def listen(event: Event) -> None:
        nonlocal ended
        ended += event.kind == "epoch"
        if stop is not None and ended > stop:
            raise KeyboardInterrupt

    fit(
        Supervised(model),
        Samples(data.images, {"y": data.labels}),
        Training(epochs=4, batch=40, lr=0.1, augment="crop_flip"),
        engine,
        seed=0,
        stage="teacher",
        listener=listen,
        checkpoint=checkpoint,
    )
    return state_digest(model)


def test_a_training_that_was_killed_ends_with_the_same_bits(
    engine: Compute, tmp_path: Path
) -> None:
    checkpoint = tmp_path / ".teacher.safetensors"
    whole = taught(engine)
    with pytest.raises(KeyboardInterrupt):
        taught(engine, checkpoint, stop=2)
    assert checkpoint.exists()
    assert taught(engine, checkpoint) == whole == taught(engine)


def test_the_evaluator_finds_what_it_finds_on_a_cpu(tiny: Tiny) -> None:
    """Float32 on both: a rate may differ by an image whose logits are all but equal."""
    gpu = compute("cuda")
    model = place(deepcopy(tiny.teacher), gpu)
    there_, here = (
        evaluate(net, tiny.test, tiny.trigger, tiny.target, where)
        for net, where in ((model, gpu), (tiny.teacher, CPU))
    )
    for key in ("clean_accuracy", "asr", "robust_accuracy"):
        assert there_[key]["total"] == here[key]["total"]
        assert abs(there_[key]["hits"] - here[key]["hits"]) <= 1


FINER = ("teacher.model.stem_stride=1", "student.model.stem_stride=1")
"""So that the last stage has more than one position."""


def config(*settings: str) -> Config:
    return parse(DIGITS, "digits", (*FINER, "precision=bfloat16", *settings))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the runs of this file: most have the teacher in common."""
    return tmp_path_factory.mktemp("store")


METHODS: dict[str, list[str]] = {
    **{f"trigger {key}": [f"trigger.name={key}"] for key in TRIGGERS},
    **{f"compression {key}": [f"compression.name={key}"] for key in COMPRESSIONS},
    **{
        f"compromise {key}": [f"compromise.name={key}", "attack.name=clean", "trigger.name=shared"]
        for key in COMPROMISES
    },
    **{
        f"defence {key}": [f"defence.name={key}", "defender.clean=100", "defender.labels=true"]
        for key in DEFENCES
    },
    "trigger sinusoid": ["trigger.name=sinusoid", "trigger.frequency=2"],  # 8 pixels a side
    "views requery": ["student.training.augment=crop"],
    "views cached": ["student.training.augment=strong", "distillation.views=cached"],
}


def checked(config: Config, tmp_path: Path, store: Path) -> None:
    """Runs an experiment: what is trained there is finite, and the teacher has learned."""
    found = run(config, tmp_path / "run", device="cuda", store=store)
    assert found["teacher"]["sha256_before"] == found["teacher"]["sha256_after"]
    assert found["teacher"]["clean_accuracy"]["value"] > 0.5
    for path in (tmp_path / "run").rglob("*.safetensors"):
        tensors, _ = read_tensors(path)
        assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()), path


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS.keys())
def test_every_method_runs_there(settings: list[str], store: Path, tmp_path: Path) -> None:
    checked(config(*settings), tmp_path, store)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs_there(loss: str, store: Path, tmp_path: Path) -> None:
    checked(methods.configs(config(), loss)["labels"], tmp_path, store)


def test_the_same_run_again_is_the_same_bits(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "other"):
        out = tmp_path / name
        run(config(), out, device="cuda", store=tmp_path / f"store-{name}")
        files = ("teacher", "poison", "student", "controls/clean")
        digests.append([file_digest(out / f"{file}.safetensors") for file in files])
    assert digests[0] == digests[1]


def test_a_student_is_audited_there(tiny: Tiny) -> None:
    """A hundred steps apart, the sizes of the changes are those found on a CPU, about."""
    sizes, other = [], trained(tiny.train, seed=1)
    for where in (CPU, compute("cuda", "float32")):
        student, teacher = (place(deepcopy(network), where) for network in (other, tiny.teacher))
        found = audit_student(student, teacher, tiny.test, compute=where)
        sizes.append(found.changes.sizes)
    torch.testing.assert_close(*sizes, rtol=0.1, atol=0)
