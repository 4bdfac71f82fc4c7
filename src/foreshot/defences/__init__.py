"""Defences: screens of the set, changes of the distillation, repairs of the student, monitors."""

from typing import Annotated

from pydantic import Field

from foreshot.defences.base import Defence, Scores, Screen
from foreshot.defences.combined import Combined
from foreshot.defences.conformal import Verdict, judge
from foreshot.defences.distilling import EveryDistilling
from foreshot.defences.distilling.base import Distilling, OwnTeacher
from foreshot.defences.monitors import EveryMonitor
from foreshot.defences.monitors.base import Monitor
from foreshot.defences.repairs import EveryRepair
from foreshot.defences.repairs.base import Repair
from foreshot.defences.screens import Single
from foreshot.family import members
from foreshot.training import TRAINING

AnyScreen = Annotated[Single | Combined, Field(discriminator="name")]
SCREENS = members(Screen, AnyScreen)
AnyDefence = Annotated[
    Single | Combined | EveryDistilling | EveryRepair | EveryMonitor, Field(discriminator="name")
]
DEFENCES = members(Defence, AnyDefence)
SCREENING = (*TRAINING, "adversarial.py", "defences", "transforms.py", "views.py")
"""Sources that screens run."""

__all__ = [
    "DEFENCES",
    "SCREENING",
    "SCREENS",
    "AnyDefence",
    "AnyScreen",
    "Combined",
    "Defence",
    "Distilling",
    "Monitor",
    "OwnTeacher",
    "Repair",
    "Scores",
    "Screen",
    "Verdict",
    "judge",
]
