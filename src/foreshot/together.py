"""Several processes that train one network together, as torchrun or Ray Train has started them.

All of them run the same experiment. The first, rank 0, has the run folder and the store; the others
compute along, as each sees a share of every batch, and leave nothing behind.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from foreshot.errors import ForeshotError
from foreshot.progress import Listener, silent

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long processes wait for each other: the first may have to wait for another run's stage."""


def size() -> int:
    """How many processes train together; 1 for one alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched() -> bool:
    """Whether torchrun has started others beside this process."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def leads() -> bool:
    """Whether this process is the first, or alone; known before it has joined the others."""
    return os.environ["RANK"] == "0" if launched() else rank() == 0


@contextmanager
def joined(out: Path, listener: Listener, device: str) -> Iterator[tuple[Path, Listener]]:
    """Joins the processes that torchrun has started; leaves them at the end.

    Gives the run folder and the listener of this process: for all but the first a folder that goes
    away again, and nobody.

    Raises:
        ForeshotError: there are fewer GPUs than processes on this machine.
    """
    join = launched() and not dist.is_initialized()
    if join:
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            mine, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if mine >= there:
                raise ForeshotError(
                    f"--nproc-per-node: expected at most one process for each of {there} GPUs, "
                    "found more; --device cpu runs without"
                )
            torch.cuda.set_device(mine)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        if leads():
            yield out, listener
        else:
            with TemporaryDirectory() as scratch:
                yield Path(scratch) / "run", silent
    finally:
        if join:
            dist.destroy_process_group()


def agree(value: T) -> T:
    """What the first process has, for all; each waits for it here."""
    box: list[Any] = [value]
    if size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def parallel(module: nn.Module) -> nn.Module:
    """The module with gradients that are means over all processes."""
    # Some losses leave parameters of a network unused, in every batch alike.
    return DistributedDataParallel(module, static_graph=True) if size() > 1 else module


def even(module: nn.Module) -> None:
    """Gives all processes the first one's buffers, such as the statistics of BatchNorm."""
    if size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def share(batch: Tensor) -> Tensor:
    """What of a batch (n,) this process sees."""
    return batch[rank() :: size()]


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if size() > 1:
        dist.all_reduce(value)
    return value
