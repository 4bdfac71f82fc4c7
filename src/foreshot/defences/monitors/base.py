"""The family of monitors: each says how suspicious an input of the finished student is."""

import math
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from foreshot.data.base import ImageSet
from foreshot.defences.base import Defence, Screen
from foreshot.defences.pool import Need
from foreshot.views import DefenderView


class Monitor(Defence):
    """A monitor flags inputs of the student, each by itself.

    Args:
        alarms: share of the clean inputs that may be flagged; the threshold is the quantile of
            the scores of the defender's clean images that promises it, if a monitor scores these as
            it does inputs: one that asks a network that knows them from its training need not.
    """

    kind = "monitor"
    alarms: float = Field(default=0.05, gt=0, lt=1)
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    @abstractmethod
    def suspicion(self, images: Tensor, view: DefenderView) -> Tensor:
        """Scores of inputs, float64 (n,), higher = more suspicious, each of its image alone.

        Args:
            images: uint8 (n, C, H, W).
            view: what the defender knows, with the student that is watched.
        """

    def threshold(self, clean: Tensor) -> float:
        """The score above which inputs are flagged, of the scores of n clean images.

        The ceil((n + 1)(1 - alarms))-th smallest: of as many inputs drawn like them, at most a
        share `alarms` is expected above it (Vovk et al., 2005). Infinite if n is too small.
        """
        place = math.ceil((len(clean) + 1) * (1 - self.alarms))
        return float(clean.sort().values[place - 1]) if place <= len(clean) else torch.inf


def screened(screen: Screen, images: Tensor, view: DefenderView) -> Tensor:
    """Scores of inputs, float64 (n,), as if they were a transfer set; see `Monitor.suspicion`."""
    pool = replace(view, transfer=ImageSet(images, None, view.transfer.classes)).pool
    pool.calibration = None  # each input is scored alone: nothing is to be compared with
    return screen.suspicion(pool)
