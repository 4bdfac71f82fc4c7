"""Distillation: a student learns from a teacher's answers and features."""

from foreshot.distillation.distiller import Distiller, Term
from foreshot.distillation.losses import *  # noqa: F403 - each is a part of this package's face
from foreshot.distillation.losses import __all__ as _losses

__all__ = ["Distiller", "Term", *_losses]  # pyright: ignore[reportUnsupportedDunderAll]
