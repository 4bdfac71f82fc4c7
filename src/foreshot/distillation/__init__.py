"""Distillation: a student learns from a teacher's answers."""

from foreshot.distillation.distiller import Distiller, Term
from foreshot.distillation.losses import (
    KD,
    LOSSES,
    AnyLoss,
    LabelledLoss,
    Loss,
    Pair,
    PairLoss,
    Signals,
    kd,
)

__all__ = [
    "KD",
    "LOSSES",
    "AnyLoss",
    "Distiller",
    "LabelledLoss",
    "Loss",
    "Pair",
    "PairLoss",
    "Signals",
    "Term",
    "kd",
]
