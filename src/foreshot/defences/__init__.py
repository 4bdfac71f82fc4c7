"""Defences: screens score the transfer set before anything is distilled from it."""

from typing import Annotated

from pydantic import Field

from foreshot.defences.base import Defence, Scores, Screen
from foreshot.defences.combined import Combined
from foreshot.defences.conformal import Verdict, judge
from foreshot.defences.screens import Single
from foreshot.family import members

AnyScreen = Annotated[Single | Combined, Field(discriminator="name")]
SCREENS = members(Screen, AnyScreen)
AnyDefence = AnyScreen
DEFENCES = members(Defence, AnyDefence)

__all__ = [
    "DEFENCES",
    "SCREENS",
    "AnyDefence",
    "AnyScreen",
    "Combined",
    "Defence",
    "Scores",
    "Screen",
    "Verdict",
    "judge",
]
