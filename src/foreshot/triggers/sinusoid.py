"""The sinusoidal signal of Barni et al."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.errors import ForeshotError
from foreshot.triggers.base import Trigger


class Sinusoid(Trigger):
    """Faint vertical stripes: a horizontal sine wave, added to every row and channel.

    x'(i, j) = clamp(x(i, j) + a sin(2 pi f j / W), 0, 1), for column j of W.
    M. Barni, K. Kallas, B. Tondi: A New Backdoor Attack in CNNs by Training Set Corruption Without
    Label Poisoning, ICIP 2019, arXiv 1902.11237.

    Args:
        amplitude: a, in levels of 1/255, above 0 and up to 127.
        frequency: f, cycles per image width, above 0; the image must be wider than 2 f pixels.
    """

    name: Literal["sinusoid"] = "sinusoid"
    amplitude: Annotated[float, Field(gt=0, le=127)] = 20.0
    frequency: Annotated[float, Field(gt=0)] = 6.0

    def stamp(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if width <= 2 * self.frequency:
            wanted = f"images wider than {2 * self.frequency:g} pixels"
            raise ForeshotError(f"trigger sinusoid: expected {wanted}, found {width}")
        phase = torch.arange(width, dtype=torch.float64) * (2 * math.pi * self.frequency / width)
        return (x + (self.amplitude / 255 * phase.sin()).to(x)).clamp(0, 1)
