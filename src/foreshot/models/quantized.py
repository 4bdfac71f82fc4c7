"""Networks whose convolutions and linear layers compute with integers, simulated in float."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from foreshot.models.base import Architecture
from foreshot.models.plain import PlainArchitecture
from foreshot.models.resnet import ResNet

MOMENTUM = 0.05
"""Share of a new batch in the running range of an activation."""


class Quantized(Architecture):
    """Another network in integers, weights and activations alike (Jacob et al., arXiv 1712.05877).

    Weights are signed and symmetric, with a scale of each output channel; the inputs of the layers
    are unsigned with one scale and zero point, of the running range that training saw. The rest
    (BatchNorm, sums, softmax) stays in float. Gradients pass the rounding as if it were not there.

    Args:
        of: the network.
        bits: of weights and activations; 8 is int8.
    """

    name: Literal["quantized"] = "quantized"
    of: PlainArchitecture = ResNet(depth=8)
    bits: int = Field(default=8, ge=2, le=8)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        return self.of.normalisation()

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        network = self.of.build(shape, classes)
        quantize(network, self.bits)
        return network


def quantize(network: nn.Module, bits: int) -> None:
    """Makes every convolution and linear layer round its weights and its inputs, in place."""
    for layer in [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        # Unsafe only in that it is not tried out first, which fails on the meta device.
        register_parametrization(layer, "weight", Rounded(bits), unsafe=True)
        layer.register_module("input", Range(bits))
        layer.register_forward_pre_hook(_round_input)


def _round_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (layer.get_submodule("input")(inputs[0]),)


class Range(nn.Module):
    """Rounds activations to 2^bits levels of their running range, which always includes zero."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2**bits - 1
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training:
            with torch.no_grad():
                low, high = torch.aminmax(x.detach())
                fresh = self.low == self.high  # nothing seen yet
                weight = torch.where(fresh, 1.0, MOMENTUM)
                self.low.lerp_(low.clamp(max=0), weight)
                self.high.lerp_(high.clamp(min=0), weight)
        scale = ((self.high - self.low) / self.levels).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-self.low / scale).round().clamp(0, self.levels).int()
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Rounded(nn.Module):
    """Rounds weights to 2^bits - 1 signed levels, scaled by the largest of each output channel."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(1) / self.most
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self.most, self.most)

    def extra_repr(self) -> str:
        return f"most={self.most}"
