"""What a model says of stored images: the one way in which foreshot asks it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foreshot.compute import Compute
from foreshot.levels import to_float


@torch.no_grad()
def logits(
    model: nn.Module,
    images: Tensor,
    compute: Compute,
    batch: int = 512,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Logits in eval mode and float32; the model's training mode is restored.

    Args:
        model: float (N, C, H, W) in [0, 1] -> logits (N, K).
        images: uint8 (N, C, H, W).
        compute: where to run.
        batch: images at a time.
        change: what is done to each batch of stored images first, such as stamping it.

    Returns:
        float32 (N, K) on the CPU.
    """
    count = len(images)
    if not count:  # which some networks do not take
        images = images.new_zeros((1, *images.shape[1:]))
    with evaluating(model):
        parts = [
            model(pixels(change(part).to(compute.device))).float().cpu()
            for part in images.split(batch)
        ]
    return torch.cat(parts)[:count]


def pixels(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 in [0, 1], laid out channels last, as convolutions like it."""
    return to_float(images).contiguous(memory_format=torch.channels_last)


def place(module: nn.Module, compute: Compute) -> nn.Module:
    """Moves a module to the device, its convolutions laid out channels last; returns it."""
    # torch's stubs do not know the overload of `to` that takes a memory format as well.
    return module.to(compute.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class evaluating:  # noqa: N801 - a context manager, used like a function
    """Puts a model into eval mode, and back into the mode that each of its modules was in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode
