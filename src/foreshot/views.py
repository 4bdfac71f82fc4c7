"""What each side knows: the attacker, and the defender, who cannot reach the attacker's secrets."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from foreshot.compute import Compute
from foreshot.data.base import ImageSet
from foreshot.errors import ForeshotError
from foreshot.executor import HERE, Executor
from foreshot.inference import logits
from foreshot.progress import Listener, silent
from foreshot.seeding import generator
from foreshot.triggers.base import Trigger

if TYPE_CHECKING:
    from foreshot.defences.pool import Pool

Kind = Literal["non_target", "target", "any"]
"""Images by what the teacher calls them."""


@dataclass(frozen=True, eq=False)
class AttackerView:
    """What crafting may use. The labels of the transfer set are not among it.

    Args:
        images: the transfer set, uint8 (N, C, H, W).
        teacher: the white-box teacher, or the surrogate that the setting allows:
            float (n, C, H, W) in [0, 1] -> logits (n, K).
        trigger: the attacker's trigger.
        target: the class that the trigger shall mean.
        seed: seed of the experiment.
        compute: device and precision.
        bases: int64 (n,), if given the very images to poison, whatever the attack would choose:
            a control that differs from an attack in one thing only.
        teacher_logits: what the teacher says of `images`, float (N, K), if that is known already.
        labeller: whom the victim's student learns from, where `teacher` is that and others as one;
            None if it is `teacher`.
        students: surrogates of the victim's student, which the attacker has distilled.
        detectors: surrogates of networks that look for perturbations, which he has trained:
            float (n, C, H, W) in [0, 1] -> log-odds (n,).
        listener: hears of the progress.
        executor: where images are perturbed; the poison is the same everywhere.
    """

    images: Tensor
    teacher: nn.Module
    trigger: Trigger
    target: int
    seed: int
    compute: Compute
    bases: Tensor | None = None
    teacher_logits: Tensor | None = None
    labeller: nn.Module | None = None
    students: tuple[nn.Module, ...] = ()
    detectors: tuple[nn.Module, ...] = ()
    listener: Listener = silent
    executor: Executor = HERE

    def without_set(self) -> "AttackerView":
        """As of a set of no images: what travels to a worker, which is told which to perturb."""
        answers = self.teacher_logits
        return AttackerView(
            images=self.images[:0].clone(),  # a part would take the whole along
            teacher=self.teacher,
            trigger=self.trigger,
            target=self.target,
            seed=self.seed,
            compute=self.compute,
            teacher_logits=None if answers is None else answers[:0].clone(),
            labeller=self.labeller,
            students=self.students,
            detectors=self.detectors,
        )

    def of_labeller(self) -> "AttackerView":
        """The same, of the network alone whom the victim's student learns from."""
        if self.labeller is None:
            return self
        return replace(self, teacher=self.labeller, labeller=None, teacher_logits=None)

    def answers(self) -> Tensor:
        """What the teacher says of the transfer set, float (N, K)."""
        if self.teacher_logits is not None:
            return self.teacher_logits
        return logits(self.teacher, self.images, self.compute)

    def drawn(self, key: str, kind: Kind) -> Tensor:
        """Indices of all images of a kind, in a random order of which `key` is the name.

        Raises:
            ForeshotError: there is none.
        """
        order = torch.randperm(len(self.images), generator=generator(self.seed, "poison", key))
        if kind != "any":
            said = self.answers().argmax(1)[order]
            order = order[(said == self.target) == (kind == "target")]
        if not len(order):
            raise ForeshotError(
                f"attack: expected images that the teacher calls {kind} (the target is "
                f"{self.target}), found none"
            )
        return order


@dataclass(frozen=True, eq=False)
class DefenderView:
    """What a defence may use: neither trigger nor target nor poison indices nor test labels.

    Args:
        transfer: the set to distil on, as it arrived.
        teacher: the trusted teacher.
        student: the student, once there is one.
        clean: a small set that the defender trusts.
        seed: the defender's own; which images the attacker takes does not follow from it.
        compute: device and precision.
        listener: hears of the progress.
        second: another trusted teacher, trained apart from the first, if there is one.
        both: whether the student has learned from the clean images that are scored beside the set
            (`pool.calibration`) as from the set. If not, their scores do not compare.
    """

    transfer: ImageSet
    teacher: nn.Module
    student: nn.Module | None
    clean: ImageSet | None
    seed: int
    compute: Compute
    listener: Listener = silent
    second: nn.Module | None = None
    both: bool = False

    def looked_at(self, student: nn.Module) -> "DefenderView":
        """The same, with a student of the set and of the clean images that are scored beside it."""
        view = replace(self, student=student, both=True)
        if "pool" in vars(self) and "teacher" in vars(self.pool):
            view.pool.teacher = self.pool.teacher  # that it need not be asked again
        return view

    @cached_property
    def pool(self) -> "Pool":
        """What screens look at, and what the networks make of it: asked once, for all screens."""
        from foreshot.defences.pool import Pool

        return Pool(self)
