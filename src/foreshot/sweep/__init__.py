"""Sweeps: many experiments that differ in some settings, each stage of them computed once."""

from foreshot.sweep.definition import Cell, Sweep, load_sweep
from foreshot.sweep.folder import results
from foreshot.sweep.job import Job

__all__ = ["Cell", "Job", "Sweep", "load_sweep", "results"]
