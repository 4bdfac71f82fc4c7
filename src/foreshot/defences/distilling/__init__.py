"""Defences that change the distillation itself, one file each."""

from foreshot.defences.distilling.adversarial_teacher import AdversarialTeacher
from foreshot.defences.distilling.consistency_weighting import ConsistencyWeighting
from foreshot.defences.distilling.purification import Purification
from foreshot.defences.distilling.smoothed_teacher import SmoothedTeacher
from foreshot.defences.distilling.strong_augmentation import StrongAugmentation

EveryDistilling = (
    StrongAugmentation | SmoothedTeacher | AdversarialTeacher | Purification | ConsistencyWeighting
)

__all__ = [
    "AdversarialTeacher",
    "ConsistencyWeighting",
    "EveryDistilling",
    "Purification",
    "SmoothedTeacher",
    "StrongAugmentation",
]
