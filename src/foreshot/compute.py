"""Where and in which precision the networks run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from foreshot.errors import ForeshotError
from foreshot.together import size

# Of whoever imports this, and so of workers as well. Some of cuDNN's algorithms add in any order,
# and what was killed may end with other bits; by default they round float32 to ten bits.
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.allow_tf32 = False

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Compute:
    """A device and the precision in which networks are trained and poison is crafted on it.

    Evaluation is always float32, so that anybody's own evaluator gets the same numbers.
    """

    device: torch.device
    bfloat16: bool

    def autocast(self) -> torch.autocast:
        """bfloat16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def holds(self, size: int) -> bool:
        """Whether so many bytes may lie on the device; of a set that may not, each batch does."""
        if self.device.type == "cpu":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return size < free / 2

    def describe(self) -> dict[str, str | int]:
        """What the bits of a result depend on beside the inputs."""
        return {
            "device": self.device.type,
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "threads": torch.get_num_threads(),
            **({"processes": size()} if size() > 1 else {}),
            "torch": str(torch.__version__),
            "kernels": self._kernels(),
        }

    def _kernels(self) -> str:
        """What the networks' arithmetic is compiled for."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return torch.backends.cpu.get_cpu_capability()


CPU = Compute(torch.device("cpu"), bfloat16=False)


def compute(device: Device = "auto", precision: Precision = "auto") -> Compute:
    """Resolves `auto`: CUDA if there is one; bfloat16 where the hardware is made for it.

    On a CPU without AVX512-BF16, and on a GPU before Ampere, bfloat16 is emulated, on the CPU ten
    times slower than float32.

    Raises:
        ForeshotError: CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ForeshotError("device: expected a CUDA GPU, found none (--device cpu runs without)")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if use_cuda
            else _cpu_has_bfloat16()
        )
    else:
        fast = precision == "bfloat16"
    return Compute(torch.device("cuda" if use_cuda else "cpu"), fast)


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """Torch's number of threads for a while; None leaves it. Results depend on it.

    Raises:
        ForeshotError: it is so large that the system may not give them.
    """
    most = max(1024, 4 * (os.cpu_count() or 1))  # the same for workers of fewer cores
    if number is not None and number > most:
        raise ForeshotError(f"threads: expected 1 to {most}, found {number}")
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
