"""Compressions: one file each; the student is the teacher, made smaller."""

from typing import Annotated

from pydantic import Field

from foreshot.compression.base import Compression
from foreshot.compression.prune import Prune
from foreshot.compression.quantize import Quantize
from foreshot.family import members

AnyCompression = Annotated[Prune | Quantize, Field(discriminator="name")]
COMPRESSIONS = members(Compression, AnyCompression)

__all__ = ["COMPRESSIONS", "AnyCompression", "Compression", "Prune", "Quantize"]
