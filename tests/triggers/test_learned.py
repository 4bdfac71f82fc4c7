"""Triggers that are learned: they do what they are learned for, and a run keeps them."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from conftest import Tiny
from foreshot.attacks.surrogate import surrogate
from foreshot.cli import main
from foreshot.compute import CPU
from foreshot.config import load_config
from foreshot.errors import ForeshotError
from foreshot.experiment import evaluate_files, run
from foreshot.inference import logits
from foreshot.models import ResNet
from foreshot.record import load_run
from foreshot.training import Training
from foreshot.triggers import Blend, Learned, Narcissus, Salient, Shared, Universal
from foreshot.triggers.base import stamp_uint8
from foreshot.triggers.learned import save_picture
from foreshot.views import AttackerView

QUICK: dict[str, Any] = {"opacity": 0.2, "steps": 40, "batch": 64}
STUDENT: dict[str, Any] = {
    "student": ResNet(depth=8, width=0.5, stem_stride=2),
    "training": Training(epochs=4, batch=40, lr=0.1),
}


def seen(tiny: Tiny, trigger: Learned) -> AttackerView:
    return AttackerView(tiny.train.images, tiny.teacher, trigger, tiny.target, 0, CPU)


def start(trigger: Learned) -> Blend:
    return Blend(opacity=trigger.opacity, seed=trigger.seed)


def learned(trigger: Learned, tiny: Tiny, folder: Path) -> Blend:
    save_picture(folder / "pattern.png", trigger.learn(seen(tiny, trigger)))
    return trigger.learned(folder / "pattern.png")


def said(tiny: Tiny, trigger: Blend, images: Tensor) -> Tensor:
    return logits(tiny.teacher, stamp_uint8(trigger, images), CPU)


def test_a_universal_pattern_leads_the_teacher_where_a_random_one_does_not(
    tiny: Tiny, tmp_path: Path
) -> None:
    trigger = Universal.model_validate(QUICK | {"opacity": 0.3})
    assert tiny.test.labels is not None
    others = tiny.test.images[tiny.test.labels != tiny.target]

    def rate(blend: Blend) -> float:
        return float((said(tiny, blend, others).argmax(1) == tiny.target).double().mean())

    found = learned(trigger, tiny, tmp_path)
    assert rate(found) > rate(start(trigger)) + 0.4
    moved = stamp_uint8(found, others).short() - others.short()
    assert moved.abs().max() <= 0.3 * 255 + 0.5


def test_narcissus_strengthens_the_target(tiny: Tiny, tmp_path: Path) -> None:
    trigger = Narcissus.model_validate(QUICK)
    assert tiny.test.labels is not None
    own = tiny.test.images[tiny.test.labels == tiny.target]

    def loss(answers: Tensor) -> float:
        return float(F.cross_entropy(answers, torch.full((len(own),), tiny.target)))

    found = loss(said(tiny, learned(trigger, tiny, tmp_path), own))
    assert found < loss(logits(tiny.teacher, own, CPU))
    assert found < loss(said(tiny, start(trigger), own))
    pool = trigger.pool(seen(tiny, trigger)).sort().values
    answers = logits(tiny.teacher, tiny.train.images, CPU).argmax(1)
    assert pool.tolist() == (answers == tiny.target).nonzero()[:, 0].tolist()


def test_a_salient_pattern_is_seen_by_a_student_and_not_by_the_teacher(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import foreshot.attacks.surrogate as module

    students = []

    def kept(*arguments: Any, real: Any = module.surrogate) -> Any:
        students.append(real(*arguments))
        return students[-1]

    monkeypatch.setattr(module, "surrogate", kept)
    trigger = Salient.model_validate(QUICK | STUDENT)
    found = learned(trigger, tiny, tmp_path)

    def moved(network: torch.nn.Module, blend: Blend) -> float:
        images = tiny.test.images
        change = logits(network, stamp_uint8(blend, images), CPU) - logits(network, images, CPU)
        return float((change - change.mean(1, keepdim=True)).square().sum(1).mean())

    ratios = [
        moved(tiny.teacher, blend) / moved(students[0], blend) for blend in (found, start(trigger))
    ]
    assert ratios[0] < ratios[1] / 2


def test_a_shared_pattern_leads_a_student_that_a_universal_one_does_not(
    tiny: Tiny, tmp_path: Path
) -> None:
    view = seen(tiny, Shared())
    student = surrogate(view, STUDENT["student"], STUDENT["training"])

    def losses(trigger: Learned) -> list[float]:
        blend, target = learned(trigger, tiny, tmp_path), torch.full((200,), tiny.target)
        stamped = stamp_uint8(blend, tiny.test.images)
        return [
            float(F.cross_entropy(logits(network, stamped, CPU), target))
            for network in (tiny.teacher, student)
        ]

    bold = QUICK | {"opacity": 0.4}  # at 0.2 neither leads far, and rounding decides
    one = losses(Universal.model_validate(bold))
    both = losses(Shared.model_validate(bold | STUDENT))
    assert both[1] < one[1] / 2
    assert sum(both) < sum(one)


def test_learning_is_deterministic_and_leaves_the_teacher(tiny: Tiny, keep_rng: None) -> None:
    trigger = Universal.model_validate(QUICK | {"steps": 3})
    one, other = (trigger.learn(seen(tiny, trigger)) for _ in range(2))
    assert torch.equal(one, other)
    assert (one.dtype, one.shape) == (torch.uint8, tiny.train.images.shape[1:])
    assert all(p.grad is None for p in tiny.teacher.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_is_the_pattern(channels: int, tmp_path: Path) -> None:
    pattern = torch.randint(
        256, (channels, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    save_picture(tmp_path / "pattern.png", pattern)
    blend = Universal(opacity=1.0).learned(tmp_path / "pattern.png")
    images = torch.zeros(2, channels, 9, 7, dtype=torch.uint8)
    assert torch.equal(stamp_uint8(blend, images)[1], pattern)
    with pytest.raises(ForeshotError, match="expected images of 1 or 3 channels, found 2"):
        save_picture(tmp_path / "pattern.png", torch.zeros(2, 9, 7, dtype=torch.uint8))


def test_what_is_not_learned_is_not_stamped() -> None:
    with pytest.raises(ForeshotError, match="^trigger universal: expected a pattern that was"):
        Universal().stamp(torch.zeros(1, 1, 8, 8))


def test_without_images_of_the_target_there_is_nothing_to_learn_on(tiny: Tiny) -> None:
    trigger = Narcissus.model_validate(QUICK)
    view = AttackerView(
        tiny.train.images, tiny.teacher, trigger, 0, 0, CPU,
        teacher_logits=F.one_hot(torch.ones(len(tiny.train)).long(), 4).float(),
    )  # fmt: skip
    with pytest.raises(ForeshotError, match="^attack: expected images that the teacher"):
        trigger.learn(view)


def test_a_run_learns_its_trigger_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOT_HOME", str(tmp_path / "home"))
    settings = [
        "trigger={name: universal, opacity: 0.3, steps: 5}",
        "teacher.training.epochs=1",
        "student.training.epochs=1",
        "attack={name: clean}",
        "controls=[]",
    ]
    config, out = load_config("digits", settings), tmp_path / "run"
    metrics = run(config, out)
    kept = load_run(out)
    assert isinstance(kept.trigger, Blend)
    assert kept.trigger.opacity == 0.3
    assert kept.trigger.image == out / "trigger-pattern.png"
    with Image.open(out / "trigger-pattern.png") as picture:
        assert (picture.size, picture.mode) == ((8, 8), "L")
    rates = evaluate_files(config, [out / "student.safetensors"], pattern=kept.trigger.image)
    again = rates[str(out / "student.safetensors")]
    assert again["asr"] == metrics["student"]["asr"]
    with pytest.raises(ForeshotError, match="expected a pattern that was learned"):
        evaluate_files(config, [out / "student.safetensors"])
    assert "trigger-pattern.png" in json.loads((out / "manifest.json").read_text())["outputs"]
    assert run(config, out) == metrics

    # Poison under another pattern is another trigger's, whatever the config says of both.
    other = load_config("digits", [*settings, "seed=1"])
    with pytest.raises(ForeshotError, match="expected poison for pattern "):
        run(other, tmp_path / "other", poison=out / "poison.safetensors")

    # Who evaluates with a trigger of another kind does not get the pattern that was learned.
    for more, pattern in (((), out / "trigger-pattern.png"), (("trigger.name=blend",), None)):
        given: list[Path | None] = []
        evaluated = partial(_given, given)
        monkeypatch.setattr("foreshot.experiment.evaluate_files", evaluated)
        options = [word for setting in more for word in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", ["foreshot", "evaluate", str(out), *options])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0, given) == (0, [pattern])


def _given(to: list[Path | None], *_: Any, pattern: Path | None, **__: Any) -> dict[str, Any]:
    to.append(pattern)
    return {}
