"""Who works, in the words of the command line: which executor, how many workers, which threads."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from foreshot.compute import Device
from foreshot.errors import ForeshotError
from foreshot.executor import Executor, Processes, Ray, Serial
from foreshot.together import launched

Engine = Literal["serial", "processes", "ray"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What runs the pieces of some work.

    Args:
        engine: serial, processes or ray; None is serial for one worker, else processes.
        workers: pieces at once.
        threads: of torch for each piece; None divides those that torch takes here between the
            workers. Results depend on it to the last bit, and stages are shared between equals.
        gpus: GPUs for each piece, of a Ray cluster.
        address: of the cluster; None is this machine.
        device: where each piece runs.
    """

    engine: Engine | None = None
    workers: int = 1
    threads: int | None = None
    gpus: float = 0
    address: str | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        if launched() and self.workers > 1:
            raise ForeshotError(
                f"--workers: expected 1 where torchrun has started the processes, "
                f"found {self.workers}"
            )
        if self.engine == "serial" and self.workers > 1:
            raise ForeshotError(f"executor serial: expected 1 worker, found {self.workers}")
        if self.engine != "ray" and (self.gpus or self.address):
            raise ForeshotError(
                "--gpus-per-run, --ray-address: expected --executor ray, "
                f"found {self.engine or 'none'}"
            )
        if self.engine == "ray" and self.device == "cuda" and not self.gpus:
            raise ForeshotError(
                "--device cuda: expected --gpus-per-run above 0, as Ray hides the rest, found 0"
            )

    @property
    def executor(self) -> Executor:
        """What runs the pieces."""
        if self.engine == "ray":
            return Ray(self.workers, self.share, self.gpus, self.address)
        if self.engine == "processes" or self.workers > 1:
            return Processes(self.workers)
        return Serial()

    @cached_property
    def share(self) -> int:
        """Torch's threads for each piece."""
        return self.threads or max(1, torch.get_num_threads() // self.workers)

    @property
    def threads_here(self) -> int | None:
        """Torch's threads where pieces are put together, so that all has the same; None for any."""
        return self.share if self.workers > 1 else self.threads
