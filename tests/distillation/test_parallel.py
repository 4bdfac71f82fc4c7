"""Features are caught under torch.compile and in data-parallel processes as they are in one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from foreshot.distillation import KD, Distiller, Term
from foreshot.distillation.losses.fitnet import FitNet
from foreshot.models import ResNet
from foreshot.seeding import generator

PAIRS = [("layer1", "layer1"), ("layer3", "layer3")]


def network(seed: int, width: float) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(depth=8, width=width, stem_stride=2).build((1, 12, 12), 4)


def distiller() -> Distiller:
    # BatchNorm in eval mode: statistics of half a batch are not those of the whole.
    student, teacher = network(0, 0.5).eval(), network(1, 1).eval()
    terms = [Term(KD(), 0.5), Term(FitNet(), 2, at=PAIRS)]
    return Distiller(student, teacher, terms, example=images()[:4])


def images() -> Tensor:
    return torch.rand((8, 1, 12, 12), generator=generator(0, "images"))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module = distiller()
    outputs = module(images())
    outputs["loss"].backward()
    return {name: value.detach() for name, value in outputs.items()}, gradients(module)


def test_a_compiled_distiller_is_the_same(
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    module = distiller()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        module.zero_grad()
        outputs = compiled(images())
        outputs["loss"].backward()
        for name, value in expected[0].items():
            torch.testing.assert_close(outputs[name], value, msg=name)
        for name, gradient in gradients(module).items():
            torch.testing.assert_close(gradient, expected[1][name], msg=name)


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    module = DistributedDataParallel(distiller())
    module(images()[4 * rank : 4 * rank + 4])["loss"].backward()
    torch.save(gradients(module), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_half_a_batch_each_have_the_gradient_of_the_whole(
    expected: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    start_processes(_work, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected[1].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-6, msg=name)
