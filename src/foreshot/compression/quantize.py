"""Quantisation-aware training."""

from typing import Literal

from pydantic import Field

from foreshot.compression.base import Compression, trainable
from foreshot.errors import ForeshotError
from foreshot.models import AnyArchitecture, Ensemble, ReusedHead
from foreshot.models.base import Normalized
from foreshot.models.quantized import Quantized, quantize


class Quantize(Compression):
    """The teacher in integers, distilled with their rounding (Jacob et al., arXiv 1712.05877).

    Args:
        bits: of weights and activations; 8 is int8.
    """

    name: Literal["quantize"] = "quantize"
    bits: int = Field(default=8, ge=2, le=8)

    def start(self, teacher: Normalized) -> Normalized:
        student = trainable(teacher)
        quantize(student.network, self.bits)
        return student

    def architecture(self, teacher: AnyArchitecture) -> AnyArchitecture:
        if isinstance(teacher, Quantized | Ensemble | ReusedHead):
            raise ForeshotError(
                f"compression: expected a teacher of one network in float, found {teacher.name}"
            )
        return Quantized(of=teacher, bits=self.bits)
