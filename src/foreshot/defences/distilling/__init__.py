"""Defences that change the distillation itself, one file each."""

from foreshot.defences.distilling.adversarial_teacher import AdversarialTeacher
from foreshot.defences.distilling.consistency_weighting import ConsistencyWeighting
from foreshot.defences.distilling.purification import Purification
from foreshot.defences.distilling.robust_kd import RobustKD
from foreshot.defences.distilling.shuffling_vaccine import ShufflingVaccine
from foreshot.defences.distilling.smoothed_teacher import SmoothedTeacher
from foreshot.defences.distilling.strong_augmentation import StrongAugmentation

EveryDistilling = (
    StrongAugmentation
    | SmoothedTeacher
    | AdversarialTeacher
    | Purification
    | ConsistencyWeighting
    | ShufflingVaccine
    | RobustKD
)

__all__ = [
    "AdversarialTeacher",
    "ConsistencyWeighting",
    "EveryDistilling",
    "Purification",
    "RobustKD",
    "ShufflingVaccine",
    "SmoothedTeacher",
    "StrongAugmentation",
]
