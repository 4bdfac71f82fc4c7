"""What the losses of relations have in common: vectors, real networks, no waiting, no order."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from conftest import NoWaiting, signals
from foreshot.distillation import Distiller, Loss, Signals, Term
from foreshot.distillation.losses.cc import CC
from foreshot.distillation.losses.crd import CRD
from foreshot.distillation.losses.pkt import PKT
from foreshot.distillation.losses.rkd import RKD
from foreshot.distillation.losses.vectors import vectors
from foreshot.errors import ForeshotError
from foreshot.models import ResNet, build

every_loss = pytest.mark.parametrize("loss", [RKD(), PKT(), CC(), CRD(negatives=64)], ids=repr)
SAMPLES = 30


def learned_by(loss: Loss, pairs: list[tuple[Tensor, Tensor]]) -> nn.Module | None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learned = loss.learn(pairs, SAMPLES)
    return learned if learned is None else learned.double()


def test_a_vector_is_the_average_over_the_places() -> None:
    (maps,) = signals(2, 3, 4, 5, count=1)
    averages = torch.stack(
        [torch.stack([channel.sum() / 20 for channel in image]) for image in maps]
    )
    torch.testing.assert_close(vectors(maps), averages)
    torch.testing.assert_close(vectors(maps.flatten(2).mT), averages)
    assert torch.equal(vectors(averages), averages)
    with pytest.raises(ForeshotError, match=r"expected features .* found \(2,\)"):
        vectors(torch.ones(2))


@every_loss
def test_maps_and_tokens_are_compared_by_their_vectors(loss: Loss) -> None:
    (one,), (other,) = signals(6, 4, 3, 3, count=1), signals(6, 5, 8, count=1, seed=1)
    learned = learned_by(loss, [(one, other)])
    values = [
        loss.value(Signals([pair], index=torch.arange(6)), deepcopy(learned))
        for pair in ((one, other), (one.mean((2, 3)), other.mean(1)))
    ]
    torch.testing.assert_close(*values)
    assert values[0] > 1e-4


@every_loss
def test_the_order_of_the_batch_does_not_count(loss: Loss) -> None:
    (one,), (other,) = signals(6, 4, count=1), signals(6, 8, count=1, seed=1)
    learned = learned_by(loss, [(one, other)])
    order, index = torch.tensor([4, 0, 5, 2, 1, 3]), torch.tensor([9, 2, 20, 5, 0, 13])
    plain = loss.value(Signals([(one, other)], index=index), deepcopy(learned))
    shuffled = Signals([(one[order], other[order])], index=index[order])
    torch.testing.assert_close(loss.value(shuffled, deepcopy(learned)), plain)
    mixed = Signals([(one[order], other)], index=index)
    assert loss.value(mixed, deepcopy(learned)) != plain


@every_loss
@pytest.mark.parametrize("autocast", [False, True])
def test_two_networks_in_a_distiller(loss: Loss, autocast: bool, keep_rng: None) -> None:
    images = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    student, teacher = (
        build(ResNet(depth=8, width=width, stem_stride=2), images, 4, 1, role)
        for role, width in (("student", 0.25), ("teacher", 0.5))
    )
    at = [("network.layer2", "network.layer2"), ("network.layer3", "network.layer3")]
    x = images / 255
    distiller = Distiller(student, teacher, [Term(loss, at=at)], example=x[:2], samples=SAMPLES)
    with NoWaiting(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = distiller(x, index=torch.arange(8) * 3)
    assert outputs["loss"].dtype == torch.float32
    assert outputs["loss"].isfinite()
    outputs["loss"].backward()
    trained = {name: p for name, p in distiller.named_parameters() if ".fc." not in name}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    learns = any(name.startswith("learned") for name in trained)
    assert learns == isinstance(loss, CC | CRD)
