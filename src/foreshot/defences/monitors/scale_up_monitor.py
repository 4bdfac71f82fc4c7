"""SCALE-UP, on inputs."""

from typing import Literal

from torch import Tensor

from foreshot.defences.monitors.base import Monitor, screened
from foreshot.defences.screens.scale_up import ScaleUp
from foreshot.views import DefenderView


class ScaleUpMonitor(Monitor):
    """SCALE-UP on inputs: a triggered answer survives light (Guo et al., arXiv 2302.03251).

    The share of factors under which the student's answer stays when the input is amplified; the
    paper's own setting. There are as many scores as factors, and one more: where more clean images
    than `alarms` have the highest, nothing is flagged.

    Args:
        screen: the factors.
    """

    name: Literal["scale_up_monitor"] = "scale_up_monitor"
    screen: ScaleUp = ScaleUp()

    def suspicion(self, images: Tensor, view: DefenderView) -> Tensor:
        return screened(self.screen, images, view)
