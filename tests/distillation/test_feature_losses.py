"""Every loss of layers through the distiller, between two networks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from foreshot.distillation import Distiller, Loss, Term
from foreshot.distillation.losses.at import AT
from foreshot.distillation.losses.fitnet import FitNet
from foreshot.distillation.losses.ofd import OFD
from foreshot.distillation.losses.review_kd import ReviewKD
from foreshot.distillation.losses.simkd import SimKD
from foreshot.distillation.losses.sp import SP
from foreshot.distillation.losses.vid import VID
from foreshot.models import ResNet, WideResNet, build
from foreshot.models.base import Architecture
from foreshot.seeding import generator

LEARNING = (FitNet(), OFD(), VID(), ReviewKD())
STAGES = [(f"network.layer{i}", f"network.layer{i}") for i in (1, 2, 3)]
OTHER_SIZES = [("network.layer2", "network.layer1"), ("network.layer3", "network.layer2")]
"""Of equal channels, as SimKD wants them."""

every_loss = pytest.mark.parametrize(
    "loss", [*LEARNING, AT(), SP(), SimKD()], ids=lambda loss: loss.name
)


SMALL = ResNet(depth=8)


def images(count: int = 8) -> Tensor:
    return torch.randint(256, (count, 3, 16, 16), generator=generator(0, "images")).to(torch.uint8)


def distiller(loss: Loss, large: Architecture = SMALL) -> Distiller:
    student = build(ResNet(depth=8, width=0.5), images(), 4, 0, "student")
    teacher = build(large, images(), 4, 0, "teacher")
    at = OTHER_SIZES if isinstance(loss, SimKD) else STAGES
    return Distiller(student, teacher, [Term(loss, 0.5, at=at)], example=images() / 255)


@every_loss
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_it_trains_the_student_and_what_it_learns(loss: Any, half: bool) -> None:
    whole, x = distiller(loss).train(), images() / 255
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        outputs = whole(x)
    value = outputs[f"0_{loss.name}"]
    assert value.dtype == outputs["loss"].dtype == torch.float32
    torch.testing.assert_close(outputs["loss"], value / 2)
    outputs["loss"].backward()
    trained = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert "student.network.conv1.weight" in trained
    assert all(name in trained for name, _ in whole.named_parameters() if "learned" in name)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in trained.values())
    assert any("learned" in name for name in trained) == (loss in LEARNING)


@every_loss
def test_going_down_its_gradient_lowers_it(loss: Loss) -> None:
    whole, x = distiller(loss).train(), images() / 255
    first = whole(x)["loss"]
    for _ in range(4):
        whole.zero_grad()
        whole(x)["loss"].backward()
        with torch.no_grad():
            for p in whole.parameters():
                if p.grad is not None:
                    p -= 1e-3 * p.grad.sign()
    assert whole(x)["loss"] < first


def test_stages_that_end_before_an_activation_have_a_margin() -> None:
    before = distiller(OFD(), WideResNet()).state_dict()
    after = distiller(OFD()).state_dict()
    for place in range(3):
        name = f"learned.0_ofd.{place}.margin"
        assert (before[name] < 0).any()
        assert not after[name].any()
