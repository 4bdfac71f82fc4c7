"""Defences: screens score the transfer set before anything is distilled from it."""

from typing import Annotated

from pydantic import Field

from foreshot.defences.base import Scores, Screen
from foreshot.defences.combined import Combined
from foreshot.defences.conformal import Verdict, judge
from foreshot.defences.screens import Single
from foreshot.family import members

AnyScreen = Annotated[Single | Combined, Field(discriminator="name")]
SCREENS = members(Screen, AnyScreen)

__all__ = ["SCREENS", "AnyScreen", "Combined", "Scores", "Screen", "Verdict", "judge"]
