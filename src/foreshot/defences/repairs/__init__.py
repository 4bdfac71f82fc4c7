"""Repairs mend a student after it was distilled, one file each."""

from foreshot.defences.repairs.anp import Anp
from foreshot.defences.repairs.clp import Clp
from foreshot.defences.repairs.fine_pruning import FinePruning
from foreshot.defences.repairs.fine_tuning import FineTuning
from foreshot.defences.repairs.ft_sam import FtSam
from foreshot.defences.repairs.i_bau import IBau
from foreshot.defences.repairs.nad import Nad
from foreshot.defences.repairs.relative_unlearning import RelativeUnlearning

EveryRepair = FineTuning | FinePruning | Nad | Anp | IBau | FtSam | Clp | RelativeUnlearning

__all__ = [
    "Anp",
    "Clp",
    "EveryRepair",
    "FinePruning",
    "FineTuning",
    "FtSam",
    "IBau",
    "Nad",
    "RelativeUnlearning",
]
