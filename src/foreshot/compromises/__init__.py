"""Compromises: one file each; a teacher that is not clean, for reference."""

from typing import Annotated

from pydantic import Field

from foreshot.compromises.adba import Adba
from foreshot.compromises.base import Compromise
from foreshot.compromises.scar import Scar
from foreshot.family import members

AnyCompromise = Annotated[Adba | Scar, Field(discriminator="name")]
COMPROMISES = members(Compromise, AnyCompromise)

__all__ = ["COMPROMISES", "Adba", "AnyCompromise", "Compromise", "Scar"]
