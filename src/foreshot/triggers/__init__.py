"""Triggers: one file a sign that an attacker puts on images."""

from typing import Annotated

from pydantic import Field

from foreshot.family import members
from foreshot.triggers.base import Trigger
from foreshot.triggers.blend import Blend
from foreshot.triggers.dot import Dot
from foreshot.triggers.grid import Grid
from foreshot.triggers.patch import Patch
from foreshot.triggers.sinusoid import Sinusoid
from foreshot.triggers.warp import Warp

AnyTrigger = Annotated[Dot | Patch | Blend | Sinusoid | Grid | Warp, Field(discriminator="name")]
TRIGGERS = members(Trigger, AnyTrigger)
