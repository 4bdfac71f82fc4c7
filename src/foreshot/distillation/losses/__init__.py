"""Distillation losses, one file each."""

from typing import Annotated

from pydantic import Field

from foreshot.distillation.losses.base import LabelledLoss, Loss, Pair, PairLoss, Signals
from foreshot.distillation.losses.kd import KD, kd
from foreshot.family import members

AnyLoss = Annotated[KD, Field(discriminator="name")]
LOSSES = members(Loss, AnyLoss)

__all__ = ["KD", "LOSSES", "AnyLoss", "LabelledLoss", "Loss", "Pair", "PairLoss", "Signals", "kd"]
