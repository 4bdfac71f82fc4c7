"""Crafting beside a peer library; the folded copy of the teacher that it asks; its shards."""

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from pickle import dumps, loads
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import Tiny, seen
from foreshot.attacks import Attack, Counterfactual, PerturbationOnly, Pgd
from foreshot.attacks.base import frozen
from foreshot.compute import CPU
from foreshot.inference import logits
from foreshot.levels import to_float, to_uint8
from foreshot.models import Ensemble, MobileNetV2, ResNet, WideResNet, build
from foreshot.models.base import Architecture
from foreshot.models.checkpoint import state_digest
from foreshot.models.quantized import quantize
from foreshot.poison import Poison
from foreshot.taps import Taps


@pytest.mark.parametrize(
    ("epsilon", "start", "least", "most"),
    [(12, False, 0.05, 0.2), (20, False, 0.3, 0.6), (28, False, 0.8, 0.95), (40, True, 0.97, 1)],
)
def test_as_many_images_are_led_to_the_target_as_by_torchattacks(
    epsilon: int, start: bool, least: float, most: float, tiny: Tiny
) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    said = logits(tiny.teacher, tiny.train.images, CPU).argmax(1)
    bases = (said != tiny.target).nonzero().flatten()
    images, wanted = tiny.train.images[bases], torch.full((len(bases),), tiny.target)
    size, step = epsilon / 255, 0.25 * epsilon / 255
    peer = torchattacks.PGD(deepcopy(tiny.teacher), size, step, steps=10, random_start=start)
    peer.set_mode_targeted_by_function(lambda _images, labels: labels)
    with torch.random.fork_rng():  # its random start is torch's
        torch.manual_seed(0)
        theirs = to_uint8(peer(to_float(images), wanted))
    attack = PerturbationOnly(epsilon=epsilon, steps=10, random_start=start, retries=0)
    ours = attack.craft(seen(tiny, bases=bases)).images
    shares = [
        (logits(tiny.teacher, found, CPU).argmax(1) == tiny.target).double().mean().item()
        for found in (ours, theirs)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert least < shares[0] <= most
    if not start:
        assert (ours == theirs).float().mean() > 0.99


@torch.no_grad()
def lived(model: nn.Module, x: Tensor) -> nn.Module:
    """With weights and statistics, those of x, in every BatchNorm that make a difference."""
    random = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
            for tensor in (layer.weight, layer.bias):
                tensor.add_(torch.randn(tensor.shape, generator=random) / 4)
    model.train()(x)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize(
    ("architecture", "left"),
    [
        (ResNet(depth=8, width=0.5), 0),
        (MobileNetV2(width=0.25), 0),
        (Ensemble(of=ResNet(depth=8, width=0.5), count=2), 0),
        (WideResNet(depth=16, width=1), 7),  # where BatchNorm comes before its convolution
    ],
)
def test_a_folded_teacher_answers_alike(architecture: Architecture, left: int) -> None:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(256, (20, 3, 16, 16), generator=random).to(torch.uint8)
    teacher = lived(build(architecture, images, 4, 0, "teacher"), to_float(images)).train()
    before = state_digest(teacher)
    folded = frozen(teacher, CPU)
    assert state_digest(teacher) == before
    assert teacher.training
    assert norms(teacher) > norms(folded) == left
    assert norms(frozen(folded, CPU)) == left
    answers = logits(teacher, images, CPU)
    for copy in (folded, frozen(folded, CPU)):
        assert (logits(copy, images, CPU) - answers).abs().max() < 1e-4
    assert answers.std(0).min() > 1e-2


def test_layers_keep_their_names_and_outputs(tiny: Tiny) -> None:
    folded, x = frozen(tiny.teacher, CPU), to_float(tiny.test.images[:8])
    names = [f"network.{n}" for n in ("layer1", "layer2.0", "layer3", "layer3.0.shortcut", "fc")]
    plain = deepcopy(tiny.teacher).eval()
    taps = [Taps(model, names, "teacher") for model in (plain, folded)]
    for model in (plain, folded):
        model(x)
    for ours, theirs in zip(taps[1].collect().values(), taps[0].collect().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """A convolution and its BatchNorm, called in a way that a subclass chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.listed = [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


class Listed(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, *self.listed):
            x = layer(x)
        return x.mean((2, 3))


class Switched(Net):
    def forward(self, x: Tensor, bare: bool = False, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if scale is not None:
            y = y * scale
        return (y if bare else self.norm(y)).mean((2, 3))


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.norm(y) if y.mean() > 0 else y).mean((2, 3))


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3)) + self.conv(x).amax((2, 3))


class Beside(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.norm(y) + y).mean((2, 3))


class Looked(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3)) * self.conv.weight.mean()


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.conv.weight)).mean((2, 3))


def hooked(net: Net) -> None:
    net.conv.register_forward_hook(lambda _layer, _inputs, output: output.relu())


def by_the_batch(net: Net) -> None:
    net.norm = nn.BatchNorm2d(4, track_running_stats=False)


@pytest.mark.parametrize(
    ("kind", "change", "left"),
    [
        (Net, None, 0),
        (Listed, None, 0),
        (Switched, None, 0),
        (Branching, None, 1),
        (Twice, None, 1),
        (Beside, None, 1),
        (Looked, None, 1),
        (Functional, None, 1),
        (Net, hooked, 1),
        (Net, by_the_batch, 1),
        (Net, lambda net: weight_norm(net.conv), 1),
        (Net, lambda net: prune.l1_unstructured(net.conv, "weight", 0.5), 1),
        (Net, lambda net: quantize(net, 8), 1),
    ],
)
def test_what_cannot_be_folded_stays_as_it_is(kind: Any, change: Any, left: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind()
        x = torch.rand(5, 1, 8, 8)
    if change:
        change(net)
    with torch.no_grad():  # torch copies no pruned network that computed a gradient
        answers = lived(net, x)(x)
    folded = frozen(net, CPU)
    assert norms(folded) == left
    assert norms(net) == 1
    torch.testing.assert_close(folded(x), answers, rtol=1e-5, atol=1e-6)


class Backward(TorchDispatchMode):
    """Notes of which inputs of convolutions a gradient is computed: input, weight, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def test_crafting_computes_no_gradient_of_a_weight(tiny: Tiny) -> None:
    """Neither the teacher's nor, where there are some, the surrogate students'."""
    tiny.teacher.requires_grad_(True)  # other tests distil from it, which freezes it
    before, views = state_digest(tiny.teacher), seen(tiny, bases=torch.arange(4))
    student = build(ResNet(depth=8, width=0.5, stem_stride=2), tiny.train.images, 4, 1, "student")
    heeded = seen(tiny, bases=torch.arange(4), students=(student,))
    for attack, view, networks in (
        (Pgd(steps=3, retries=0), views, 1),
        (Counterfactual(steps=3, retries=0), heeded, 2),
    ):
        with Backward() as noted:
            Attack.craft(attack, view)
        convolutions = sum(isinstance(m, nn.Conv2d) for m in tiny.teacher.modules())
        assert noted.masks == [[True, False, False]] * (3 * networks * convolutions)
    assert state_digest(tiny.teacher) == before
    assert all(p.requires_grad and p.grad is None for p in tiny.teacher.parameters())


def _shard(rank: int, work: bytes, folder: str) -> None:
    torch.set_num_threads(1)
    attack, views = loads(work)
    attack.craft(views[rank]).save(Path(folder) / f"{rank}.safetensors", {})


def test_two_processes_with_a_part_each_craft_what_one_does(tiny: Tiny, tmp_path: Path) -> None:
    attack = Pgd(epsilon=20, steps=3, retries=1)
    bases = torch.arange(7, 107)
    whole = attack.craft(seen(tiny, bases=bases))
    views = [seen(tiny, bases=bases[a:b]) for a, b in pairwise((0, 37, 100))]
    spawn(_shard, (dumps((attack, views)), str(tmp_path)), nprocs=1)
    _shard(1, dumps((attack, views)), str(tmp_path))
    parts = [Poison.load(tmp_path / f"{rank}.safetensors")[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
