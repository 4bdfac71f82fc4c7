"""The blended pattern of Chen et al."""

from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL.Image import Resampling
from pydantic import Field, model_validator
from torch import Tensor

from foreshot.data.files import LARGEST_PICTURE, check_digest, read_file, read_picture
from foreshot.levels import to_float
from foreshot.seeding import generator
from foreshot.triggers.base import Trigger


class Blend(Trigger):
    """A pattern, random or an image of your own, blended into the whole image.

    x' = (1 - opacity) x + opacity pattern.
    X. Chen, C. Liu, B. Li, K. Lu, D. Song: Targeted Backdoor Attacks on Deep Learning Systems Using
    Data Poisoning, 2017, arXiv 1712.05526.

    Args:
        opacity: weight of the pattern, above 0 and up to 1.
        seed: seed of the random pattern.
        pattern: cells are black or white in each channel (`binary`), or any level (`uniform`).
        cell: side of a cell in pixels, 1 or more.
        image: PNG, JPEG or WEBP file, stretched to the images' size, instead of a random pattern;
            images without three channels take its luma.
        image_sha256: digest of the file, hex; filled in when it is left out, so that a written
            configuration names the bytes and not only the path.
    """

    name: Literal["blend"] = "blend"
    opacity: Annotated[float, Field(gt=0, le=1)] = 0.15
    seed: int = 0
    pattern: Literal["binary", "uniform"] = "binary"
    cell: Annotated[int, Field(ge=1)] = 1
    image: Path | None = None
    image_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _pin_image(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and not fields.get("image_sha256"):
            image = fields.get("image")
            if isinstance(image, str | Path):
                return {
                    **fields,
                    "image_sha256": sha256(read_file(Path(image), LARGEST_PICTURE)).hexdigest(),
                }
        return fields

    def picture(self, shape: tuple[int, int, int]) -> Tensor:
        """The pattern on images of this shape: float32 (C, H, W) in [0, 1]."""
        if self.image is not None:
            return _decoded(self.image, self.image_sha256, shape)
        channels, height, width = shape
        cells = (channels, -(-height // self.cell), -(-width // self.cell))
        noise = torch.rand(cells, generator=generator(self.seed, "blend"))
        if self.pattern == "binary":
            noise = noise.round()
        for side in (1, 2):
            noise = noise.repeat_interleave(self.cell, side)
        return noise[:, :height, :width]

    def learned(self, picture: Path) -> "Blend":
        """The trigger with a pattern that was learned and stored."""
        return Blend(opacity=self.opacity, image=picture)

    def stamp(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        return torch.lerp(x, self.picture((channels, height, width)).to(x), self.opacity)


@lru_cache(maxsize=8)
def _decoded(path: Path, digest: str | None, shape: tuple[int, int, int]) -> Tensor:
    """The image file at this size, float32 (C, H, W) in [0, 1], once its digest is verified."""
    content = read_file(path, LARGEST_PICTURE)
    check_digest(content, f"sha256:{digest}", str(path))
    channels, height, width = shape
    upright = read_picture(content, ("PNG", "JPEG", "WEBP"), str(path))
    bands = upright.convert("RGB" if channels == 3 else "L")
    stretched = bands.resize((width, height), Resampling.BILINEAR)
    levels = torch.frombuffer(bytearray(stretched.tobytes()), dtype=torch.uint8)
    return to_float(levels.reshape(height, width, -1).permute(2, 0, 1).expand(shape))
