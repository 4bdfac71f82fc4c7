"""Distillation losses, one file each."""

from typing import Annotated

from pydantic import Field

from foreshot.distillation.losses.at import AT
from foreshot.distillation.losses.base import LabelledLoss, Loss, Pair, PairLoss, Signals
from foreshot.distillation.losses.cc import CC
from foreshot.distillation.losses.crd import CRD
from foreshot.distillation.losses.dist import DIST
from foreshot.distillation.losses.dkd import DKD
from foreshot.distillation.losses.fitnet import FitNet
from foreshot.distillation.losses.hard_labels import HardLabels
from foreshot.distillation.losses.kd import KD, kd
from foreshot.distillation.losses.lskd import LSKD
from foreshot.distillation.losses.mlkd import MLKD
from foreshot.distillation.losses.ofd import OFD
from foreshot.distillation.losses.pkt import PKT
from foreshot.distillation.losses.review_kd import ReviewKD
from foreshot.distillation.losses.rkd import RKD
from foreshot.distillation.losses.simkd import SimKD
from foreshot.distillation.losses.sp import SP
from foreshot.distillation.losses.vid import VID
from foreshot.distillation.losses.wttm import WTTM
from foreshot.family import members

Response = KD | DKD | DIST | LSKD | MLKD | WTTM | HardLabels
Feature = FitNet | AT | SP | OFD | ReviewKD | SimKD | VID
Relation = RKD | PKT | CC | CRD
AnyLoss = Annotated[Response | Feature | Relation, Field(discriminator="name")]
LOSSES = members(Loss, AnyLoss)

__all__ = [
    "AT",
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "LOSSES",
    "LSKD",
    "MLKD",
    "OFD",
    "PKT",
    "RKD",
    "SP",
    "VID",
    "WTTM",
    "AnyLoss",
    "FitNet",
    "HardLabels",
    "LabelledLoss",
    "Loss",
    "Pair",
    "PairLoss",
    "ReviewKD",
    "Signals",
    "SimKD",
    "kd",
]
