"""Small changes of an image that a perturbation does not survive, and an image's meaning does."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from foreshot.family import Part
from foreshot.transforms import blur, depth, jpeg, median

Small = Literal["jpeg", "median", "blur", "depth"]


class Changing(Part):
    """How strong each change is.

    Args:
        quality: of the JPEG.
        sigma: of the blur, in pixels.
        bits: a channel that `depth` leaves.
    """

    quality: int = Field(default=75, ge=1, le=95)
    sigma: float = Field(default=0.7, gt=0, le=3)
    bits: int = Field(default=4, ge=1, le=7)

    def small(self, x: Tensor, change: Small) -> Tensor:
        """Images float (n, C, H, W) in [0, 1] after a change."""
        match change:
            case "jpeg":
                return jpeg(x, self.quality)
            case "median":
                return median(x)
            case "blur":
                return blur(x, self.sigma)
            case "depth":
                return depth(x, self.bits)
