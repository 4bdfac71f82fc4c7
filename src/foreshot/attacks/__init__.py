"""Attacks on the transfer set, one file each."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.base import Attack, Problem
from foreshot.attacks.clean import Clean
from foreshot.attacks.counterfactual import Counterfactual
from foreshot.attacks.covered import Covered
from foreshot.attacks.cw import Cw
from foreshot.attacks.cw_l2 import CwL2
from foreshot.attacks.dehib import DeHiB
from foreshot.attacks.dirty_label import DirtyLabel
from foreshot.attacks.eot import Eot
from foreshot.attacks.fgsm import Fgsm
from foreshot.attacks.label_consistent import LabelConsistent
from foreshot.attacks.noise import Noise
from foreshot.attacks.perturbation_only import PerturbationOnly
from foreshot.attacks.pgd import Pgd
from foreshot.attacks.sleeper_agent import SleeperAgent
from foreshot.attacks.tang import Tang
from foreshot.attacks.trigger_only import TriggerOnly
from foreshot.compute import CPU, Compute
from foreshot.data.base import check_images
from foreshot.errors import ForeshotError
from foreshot.executor import HERE, Executor
from foreshot.family import members
from foreshot.inference import logits
from foreshot.poison import Poison
from foreshot.progress import Listener, silent
from foreshot.triggers.base import Trigger
from foreshot.views import AttackerView

AnyAttack = Annotated[
    Clean
    | TriggerOnly
    | PerturbationOnly
    | Noise
    | Fgsm
    | Pgd
    | Cw
    | CwL2
    | Eot
    | Counterfactual
    | Covered
    | Tang
    | DeHiB
    | LabelConsistent
    | SleeperAgent
    | DirtyLabel,
    Field(discriminator="name"),
]
ATTACKS = members(Attack, AnyAttack)


def craft(
    attack: Attack,
    images: Tensor,
    teacher: nn.Module,
    trigger: Trigger,
    target: int,
    *,
    seed: int = 0,
    compute: Compute = CPU,
    listener: Listener = silent,
    executor: Executor = HERE,
) -> Poison:
    """Poison for a transfer set of your own, with a teacher of your own.

    Args:
        attack: such as `Pgd(rate=0.01, epsilon=8)`.
        images: the transfer set, uint8 (N, C, H, W).
        teacher: float (n, C, H, W) in [0, 1] -> logits (n, K), on the device of `compute`.
        trigger: such as `Patch(size=4)`.
        target: the class that the trigger shall mean.
        seed: every random choice follows from it.
        compute: device and precision.
        listener: hears of the progress.
        executor: where it is crafted, such as `Processes(4)`; the poison is the same everywhere.

    Raises:
        ForeshotError: the attack does not fit the images or the teacher.
    """
    check_images(images)
    classes = logits(teacher, images[:1], compute).shape[1]
    if not 0 <= target < classes:
        raise ForeshotError(f"target: expected 0 to {classes - 1}, found {target}")
    known = images, teacher, trigger, target, seed, compute
    view = AttackerView(*known, listener=listener, executor=executor)
    return attack.craft(view)


__all__ = [
    "ATTACKS",
    "AnyAttack",
    "Attack",
    "Clean",
    "Counterfactual",
    "Covered",
    "Cw",
    "CwL2",
    "DeHiB",
    "DirtyLabel",
    "Eot",
    "Fgsm",
    "LabelConsistent",
    "Noise",
    "PerturbationOnly",
    "Pgd",
    "Problem",
    "SleeperAgent",
    "Tang",
    "TriggerOnly",
    "craft",
]
