"""Screens on the transfer set, one file each."""

from typing import Annotated

from pydantic import Field

from foreshot.defences.screens.activation_clustering import ActivationClustering
from foreshot.defences.screens.beatrix import Beatrix
from foreshot.defences.screens.consistency import TeacherConsistency
from foreshot.defences.screens.detector import Detector
from foreshot.defences.screens.frequency import Frequency
from foreshot.defences.screens.label_disagreement import LabelDisagreement
from foreshot.defences.screens.lid import LocalDimension
from foreshot.defences.screens.mahalanobis import Mahalanobis
from foreshot.defences.screens.near_duplicate import NearDuplicate
from foreshot.defences.screens.scale_up import ScaleUp
from foreshot.defences.screens.scan import Scan
from foreshot.defences.screens.second_teacher import SecondTeacher
from foreshot.defences.screens.spectral_signature import SpectralSignature
from foreshot.defences.screens.spectre import Spectre
from foreshot.defences.screens.strip import Strip
from foreshot.defences.screens.view_disagreement import ViewDisagreement

Single = (
    TeacherConsistency
    | ViewDisagreement
    | SecondTeacher
    | LabelDisagreement
    | Frequency
    | Detector
    | NearDuplicate
    | Mahalanobis
    | LocalDimension
    | SpectralSignature
    | ActivationClustering
    | Scan
    | Spectre
    | Beatrix
    | Strip
    | ScaleUp
)
AnySingle = Annotated[Single, Field(discriminator="name")]

__all__ = [
    "ActivationClustering",
    "AnySingle",
    "Beatrix",
    "Detector",
    "Frequency",
    "LabelDisagreement",
    "LocalDimension",
    "Mahalanobis",
    "NearDuplicate",
    "ScaleUp",
    "Scan",
    "SecondTeacher",
    "Single",
    "SpectralSignature",
    "Spectre",
    "Strip",
    "TeacherConsistency",
    "ViewDisagreement",
]
