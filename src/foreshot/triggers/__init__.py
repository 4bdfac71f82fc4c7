"""Triggers: one file a sign that an attacker puts on images."""

from typing import Annotated

from pydantic import Field

from foreshot.family import members
from foreshot.triggers.base import Trigger
from foreshot.triggers.blend import Blend
from foreshot.triggers.dot import Dot
from foreshot.triggers.grid import Grid
from foreshot.triggers.learned import Learned
from foreshot.triggers.narcissus import Narcissus
from foreshot.triggers.patch import Patch
from foreshot.triggers.salient import Salient
from foreshot.triggers.shared import Shared
from foreshot.triggers.sinusoid import Sinusoid
from foreshot.triggers.universal import Universal
from foreshot.triggers.warp import Warp

AnyTrigger = Annotated[
    Dot | Patch | Blend | Sinusoid | Grid | Warp | Universal | Narcissus | Salient | Shared,
    Field(discriminator="name"),
]
TRIGGERS = members(Trigger, AnyTrigger)

__all__ = [
    "TRIGGERS",
    "AnyTrigger",
    "Blend",
    "Dot",
    "Grid",
    "Learned",
    "Narcissus",
    "Patch",
    "Salient",
    "Shared",
    "Sinusoid",
    "Trigger",
    "Universal",
    "Warp",
]
