"""The family of attacks on the transfer set, and the story that they share.

An attack picks base images, perturbs them inside a box of 8-bit levels, asks the teacher what it
says of the image as it would be stored, and tries the failures again with more effort and with
other base images. What is kept is what convinces the teacher most.
"""

import math
from abc import abstractmethod
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.folding import fold
from foreshot.compute import Compute
from foreshot.errors import ForeshotError
from foreshot.family import Member
from foreshot.inference import logits, pixels, place
from foreshot.levels import to_uint8
from foreshot.poison import Poison
from foreshot.progress import Event
from foreshot.seeding import generator
from foreshot.triggers.base import stamp_uint8, unperturbed
from foreshot.views import AttackerView, Kind

CHUNK = 64
"""Images that are crafted together. Fixed and padded, so that no result depends on the split."""


class Attack(Member):
    """What all attacks have in common; each adds how it perturbs.

    Args:
        rate: share of the transfer set that is poisoned.
        count: number of poisoned images; if given, it takes the place of `rate`.
        epsilon: L-inf radius in 1/255 of the pixel range, around the stamped image (around the
            plain one, if the attack does not stamp).
        trigger: when the trigger is put on: `before` the optimisation (which may then change its
            pixels), `inside` (the teacher sees it at every step, pixels that it covers wholly
            stay as they are), or `after`.
        base: the images to poison, by what the teacher calls them: any but the target
            (`non_target`), only the target (`target`), or `any`.
        candidates: crafts this many times as many images as are wanted, and keeps those that
            convince the teacher most, as many of each class as are wanted of it.
        confidence: the teacher's softmax probability of the target (at temperature 1) that a
            stored image must reach.
        retries: how often images that fail are crafted again, with twice the steps each time, and
            replaced by fresh base images.
    """

    rate: float = Field(default=0.05, gt=0, le=1)
    count: int | None = Field(default=None, ge=1)
    epsilon: int = Field(default=16, ge=0, le=255)
    trigger: Literal["before", "inside", "after"] = "inside"
    base: Kind = "non_target"
    candidates: float = Field(default=1.0, ge=1, le=100)
    confidence: float = Field(default=0.5, ge=0, lt=1)
    retries: int = Field(default=2, ge=0, le=10)

    stamps: ClassVar[bool | None] = True
    """Whether the stored image carries the trigger; None: as much of it as the attack chooses."""
    convinces: ClassVar[bool] = True
    """Whether the teacher has to call the stored image the target."""

    @abstractmethod
    def perturb(self, problem: "Problem") -> Tensor:
        """The perturbed images, float in [problem.low, problem.high]."""

    def wanted(self, transfer: int) -> int:
        """Number of images to poison of a transfer set of that size.

        Raises:
            ForeshotError: that is none, or more than there are.
        """
        count = round(self.rate * transfer) if self.count is None else self.count
        if not 1 <= count <= transfer:
            key = "attack.rate" if self.count is None else "attack.count"
            raise ForeshotError(
                f"{key}: expected 1 to {transfer} poisoned images of the transfer set, "
                f"found {count}"
            )
        return count

    def craft(self, view: AttackerView) -> Poison:
        """Poison for the transfer set: deterministic, and the same for any split into batches."""
        wanted = self.wanted(len(view.images)) if view.bases is None else len(view.bases)
        pool = self._bases(view) if view.bases is None else view.bases
        if len(pool) < wanted:
            raise ForeshotError(
                f"attack.base: expected {wanted} base images of the kind {self.base!r}, "
                f"found {len(pool)}"
            )
        teacher = frozen(view.teacher, view.compute)
        view = replace(view, students=tuple(frozen(s, view.compute) for s in view.students))
        fixed = view.bases is not None or not self.convinces
        first = wanted if fixed else min(math.ceil(wanted * self.candidates), len(pool))
        tries = 0 if not self.convinces else self.retries
        bar = math.log(max(self.confidence, 1e-30))
        work = _Progress(view, first)
        kept = self._attempt(view, teacher, pool[:first], 0, work)
        unused = pool[len(pool) if fixed else first :]
        for effort in range(1, tries + 1):
            failed = kept.score < bar
            missing = wanted - int((~failed).sum())
            if missing <= 0:
                break
            fresh, unused = unused[:missing], unused[missing:]
            work.more(int(failed.sum()) + len(fresh))
            again = self._attempt(view, teacher, kept.indices[failed], effort, work)
            other = self._attempt(view, teacher, fresh, effort, work)
            kept = kept.keep(~failed).join(kept.keep(failed).better_of(again)).join(other)
        if self.convinces:
            failed = kept.score < bar
            sure, unsure = kept.keep(~failed), kept.keep(failed)
            short = wanted - len(sure.indices)
            kept = sure.spread(wanted, view.answers().argmax(1)).join(unsure.best(max(short, 0)))
            if short > 0:
                work.note(
                    f"{short} of {wanted} poisoned images do not reach the teacher's confidence "
                    f"of {self.confidence:g} after {tries} retries; kept as they are"
                )
        chosen = kept.in_order()
        work.end()
        return Poison(chosen.indices, chosen.images, self.labels(chosen.indices, view))

    def conviction(self, problem: "Problem", stored: Tensor) -> Tensor:
        """Log-probability of the target that the teacher gives stored images, float64 (n,).

        It decides which candidates are kept, and which are crafted again.
        """
        view = problem.view
        said = logits(view.teacher, stored, view.compute, CHUNK).double()
        return F.log_softmax(said, 1)[:, view.target]

    def labels(self, indices: Tensor, view: AttackerView) -> Tensor | None:  # noqa: ARG002
        """Labels that the attack dictates; None where the teacher labels."""
        return None

    def _bases(self, view: AttackerView) -> Tensor:
        """Candidate base images, by what the teacher calls them: the first are taken first."""
        return view.drawn("bases", self.base)

    def _attempt(
        self,
        view: AttackerView,
        teacher: nn.Module,
        indices: Tensor,
        effort: int,
        work: "_Progress",
    ) -> "_Crafted":
        """Crafts at `indices`; each image is the same whichever others are crafted with it."""
        parts = [_Crafted.none(view.images)]
        for part in indices.split(CHUNK) if len(indices) else ():  # nothing splits into one part
            # Filled up by repeating: a convolution of another batch size rounds otherwise.
            filled = part.repeat(math.ceil(CHUNK / len(part)))[:CHUNK] if self.convinces else part
            problem = Problem.pose(self, view, teacher, filled, effort)
            stored = problem.store(self.perturb(problem))
            crafted = _Crafted(filled, stored, self.conviction(problem, stored))
            parts.append(crafted.keep(slice(0, len(part))))
            work.advance(len(part))
        return _Crafted.cat(parts)


@dataclass(frozen=True, eq=False)
class Problem:
    """One chunk to perturb: find x in [low, high] for which the teacher says the target.

    Args:
        attack: whose epsilon and trigger placement hold.
        view: what the attacker knows.
        teacher: frozen; float (n, C, H, W) in [0, 1] -> logits.
        start: float (n, C, H, W), the images without any perturbation.
        low, high: bounds of x, whole 8-bit levels / 255: epsilon, [0, 1], fixed trigger pixels.
        indices: int64 (n,), global: randomness is keyed by them.
        effort: 0 at first, one more at each retry.
    """

    attack: Attack
    view: AttackerView
    teacher: nn.Module
    start: Tensor
    low: Tensor
    high: Tensor
    indices: Tensor
    effort: int

    @classmethod
    def pose(
        cls, attack: Attack, view: AttackerView, teacher: nn.Module, indices: Tensor, effort: int
    ) -> Self:
        """The box around the stamped images, or the plain ones if the trigger comes after."""
        images = view.images[indices]
        early = attack.stamps and attack.trigger != "after"
        start = stamp_uint8(view.trigger, images) if early else images
        centre = start.short()
        low = (centre - attack.epsilon).clamp(min=0)
        high = (centre + attack.epsilon).clamp(max=255)
        if early and attack.trigger == "inside":
            fixed = view.trigger.opaque((images.shape[1], images.shape[2], images.shape[3]))
            low, high = torch.where(fixed, centre, low), torch.where(fixed, centre, high)
        start, low, high = (pixels(levels.to(view.compute.device)) for levels in (start, low, high))
        return cls(attack, view, teacher, start, low, high, indices, effort)

    def store(self, x: Tensor) -> Tensor:
        """The 8-bit images that are put into the transfer set, never further off than epsilon."""
        images, attack = to_uint8(x.detach().float()).cpu(), self.attack
        if attack.stamps and attack.trigger == "after":
            images = stamp_uint8(self.view.trigger, images)
        plain = self.view.images[self.indices]
        home = unperturbed(self.view.trigger, plain, images, attack.stamps).short()
        held = torch.clamp(images.short(), home - attack.epsilon, home + attack.epsilon)
        return held.to(torch.uint8)

    def logits(self, x: Tensor) -> Tensor:
        """What the teacher says of x, float32, in the precision of crafting."""
        with self.view.compute.autocast():
            return self.teacher(x).float()

    def noise(self) -> Tensor:
        """Uniform in [0, 1), shaped as x; each image's depends on its global index alone."""
        shape = tuple(self.start.shape[1:])
        keys = ("poison", "noise", self.effort)
        rows = [
            torch.rand(shape, generator=generator(self.view.seed, *keys, index))
            for index in self.indices.tolist()
        ]
        return torch.stack(rows).to(self.start.device)

    def hold(self, x: Tensor) -> Tensor:
        """X moved to the nearest point of the box."""
        return x.maximum(self.low).minimum(self.high)


@dataclass(frozen=True, eq=False)
class _Crafted:
    """Stored images with the log-probability of the target that the teacher gives each."""

    indices: Tensor
    images: Tensor
    score: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Self:
        empty = torch.zeros(0)
        return cls(empty.long(), like[:0], empty.double())

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        return cls(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.images for part in parts]),
            torch.cat([part.score for part in parts]),
        )

    def keep(self, which: Tensor | slice) -> Self:
        return type(self)(self.indices[which], self.images[which], self.score[which])

    def join(self, other: Self) -> Self:
        return self.cat([self, other])

    def better_of(self, other: Self) -> Self:
        better = other.score > self.score
        images = torch.where(better[:, None, None, None], other.images, self.images)
        return type(self)(self.indices, images, torch.where(better, other.score, self.score))

    def best(self, count: int) -> Self:
        return self.keep(self.score.argsort(descending=True, stable=True)[:count])

    def spread(self, count: int, said: Tensor) -> Self:
        """The best of each class, in proportion to how many there are of it.

        The most convincing of all are of few classes: their poison is alike, and a student learns
        it by that and not by the trigger.

        Args:
            count: how many to keep.
            said: the class of each image of the transfer set.
        """
        order = self.score.argsort(descending=True, stable=True)
        order = order[said[self.indices[order]].argsort(stable=True)]
        mine = said[self.indices[order]]
        sizes = mine.bincount()
        place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[mine]
        share = (place + 0.5) / sizes[mine]
        return self.keep(order[share.argsort(stable=True)[:count]])

    def in_order(self) -> Self:
        return self.keep(self.indices.argsort())


class _Progress:
    """Tells the listener how far crafting is."""

    def __init__(self, view: AttackerView, total: int) -> None:
        self.tell, self.done, self.total = view.listener, 0, total
        self.tell(Event("poison", "start", 0, total))

    def more(self, images: int) -> None:
        self.total += images

    def advance(self, images: int) -> None:
        self.done += images
        self.tell(Event("poison", "advance", self.done, self.total))

    def note(self, message: str) -> None:
        self.tell(Event("poison", "note", message=message))

    def end(self) -> None:
        self.tell(Event("poison", "end", self.done, self.total))


def frozen(teacher: nn.Module, compute: Compute) -> nn.Module:
    """A copy of the teacher on the device: eval mode, BatchNorm folded, no gradient to weights."""
    model = deepcopy(teacher).eval()
    fold(model)
    return place(model.requires_grad_(False), compute)
