"""Distillation: a student learns from a teacher's answers."""

from foreshot.distillation.distiller import Distiller, Term
from foreshot.distillation.losses import KD, LOSSES, AnyLoss, Loss, kd

__all__ = ["KD", "LOSSES", "AnyLoss", "Distiller", "Loss", "Term", "kd"]
