"""Monitors look at what a student is asked once it is in use, one file each."""

from foreshot.defences.monitors.disagreement import Disagreement
from foreshot.defences.monitors.scale_up_monitor import ScaleUpMonitor
from foreshot.defences.monitors.strip_monitor import StripMonitor

EveryMonitor = StripMonitor | ScaleUpMonitor | Disagreement

__all__ = ["Disagreement", "EveryMonitor", "ScaleUpMonitor", "StripMonitor"]
