"""STRIP, on inputs."""

from typing import Literal

from torch import Tensor

from foreshot.defences.monitors.base import Monitor, screened
from foreshot.defences.screens.strip import Strip
from foreshot.views import DefenderView


class StripMonitor(Monitor):
    """STRIP on inputs: a triggered answer survives overlays (Gao et al., arXiv 1902.06531).

    Minus the mean entropy of what the student says of the input with clean images laid over it;
    the paper's own setting. What is laid over is never an image that sets the threshold.

    Args:
        screen: what is laid over, and how often.
    """

    name: Literal["strip_monitor"] = "strip_monitor"
    screen: Strip = Strip()

    def suspicion(self, images: Tensor, view: DefenderView) -> Tensor:
        return screened(self.screen, images, view)
