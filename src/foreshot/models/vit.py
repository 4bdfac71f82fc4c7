"""Vision transformer for small images."""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from foreshot.errors import ForeshotError
from foreshot.models.base import Architecture


class Vit(Architecture):
    """Vision transformer over patches, with a class token and learned positions.

    A. Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition at
    Scale, ICLR 2021, arXiv 2010.11929; pre-norm, without dropout. Each of its three stages holds a
    third of the blocks and outputs tokens (N, 1 + patches, dim), the class token first.

    Args:
        patch: side of a patch in pixels, 1 or more; both sides of the image are multiples of it.
        dim: length of a token, a multiple of heads, up to 1024.
        depth: number of blocks, 3 to 48.
        heads: attention heads of a block, 1 or more.
    """

    name: Literal["vit"] = "vit"
    patch: Annotated[int, Field(ge=1, le=64)] = 4
    dim: Annotated[int, Field(ge=8, le=1024)] = 128
    depth: Annotated[int, Field(ge=3, le=48)] = 6
    heads: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _heads_share_tokens(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim: expected a multiple of heads = {self.heads}, found {self.dim}")
        return self

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        _, height, width = shape
        self.check_side(shape, self.patch)
        if height % self.patch or width % self.patch:
            wanted = f"both sides of the images to be multiples of patch = {self.patch}"
            raise ForeshotError(f"model vit: expected {wanted}, found {height} x {width}")
        return Transformer(shape, self, classes)


class Transformer(nn.Module):
    """Patches to tokens, three stages of blocks, and a linear classifier on the class token."""

    def __init__(self, shape: tuple[int, int, int], config: Vit, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        tokens = 1 + (height // config.patch) * (width // config.patch)
        self.patches = nn.Conv2d(channels, config.dim, config.patch, config.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(torch.zeros(1, tokens, config.dim))
        stages = [
            nn.Sequential(*(Block(config.dim, config.heads) for _ in range(blocks)))
            for blocks in ((config.depth + later) // 3 for later in (2, 1, 0))
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.norm = nn.LayerNorm(config.dim)
        self.fc = nn.Linear(config.dim, classes)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.norm(x[:, 0]))


class Block(nn.Module):
    """Self-attention, then a perceptron of four times the width, each normalised and added."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        # (N, T, 3 D) -> three times (N, heads, T, D / heads)
        split = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*split.unbind())
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
