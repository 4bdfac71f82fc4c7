"""The family of attacks on the transfer set, and the story that they share.

An attack picks base images, perturbs them inside a box of 8-bit levels, asks the teacher what it
says of the image as it would be stored, and tries the failures again with more effort and with
other base images. What is kept is what convinces the teacher most.
"""

import math
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.attacks.crafting import Candidates, Crafting, Progress, chunk_size
from foreshot.attacks.folding import frozen
from foreshot.attacks.problem import Problem
from foreshot.errors import ForeshotError
from foreshot.family import Member
from foreshot.inference import logits
from foreshot.poison import Poison
from foreshot.views import AttackerView, Kind


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
            convince the teacher most, of each class in proportion to how many of it do.
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

    shared: ClassVar[frozenset[str]] = frozenset({"rate", "count", "epsilon"})
    """The attacker's budget, by which attacks are compared."""
    stamps: ClassVar[bool | None] = True
    """Whether the stored image carries the trigger; None: as much of it as the attack chooses."""
    convinces: ClassVar[bool] = True
    """Whether the teacher has to call the stored image the target."""

    @abstractmethod
    def perturb(self, problem: Problem) -> Tensor:
        """The perturbed images, float in [problem.low, problem.high]."""

    def beside(self, view: AttackerView) -> Tensor:  # noqa: ARG002
        """Indices of the images that perturbing others looks at, in `problem.beside`.

        A worker has no other image of the set than these and those that it perturbs.
        """
        return torch.zeros(0, dtype=torch.long)

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
        if self.convinces or view.bases is None:  # asked once, for all that follows
            view = replace(view, teacher_logits=view.answers())
        wanted = self.wanted(len(view.images)) if view.bases is None else len(view.bases)
        pool = self._bases(view) if view.bases is None else view.bases
        if len(pool) < wanted:
            raise ForeshotError(
                f"attack.base: expected {wanted} base images of the kind {self.base!r}, "
                f"found {len(pool)}"
            )
        students, detectors = (
            tuple(frozen(network, view.compute) for network in networks)
            for networks in (view.students, view.detectors)
        )
        view = replace(view, students=students, detectors=detectors)
        fixed = view.bases is not None or not self.convinces
        first = wanted if fixed else min(math.ceil(wanted * self.candidates), len(pool))
        tries = 0 if not self.convinces else self.retries
        bar = math.log(max(self.confidence, 1e-30))
        crafting = Crafting(self, view, view.images[self.beside(view)])
        work = Progress(view, first)
        kept = _attempt(crafting, pool[:first], 0, work)
        unused = pool[len(pool) if fixed else first :]
        for effort in range(1, tries + 1):
            failed = kept.score < bar
            missing = wanted - int((~failed).sum())
            if missing <= 0:
                break
            fresh, unused = unused[:missing], unused[missing:]
            old = kept.keep(failed)
            wanting = torch.cat([old.indices, fresh])
            work.more(len(wanting))
            tried = _attempt(crafting, wanting, effort, work)
            again, other = tried.keep(slice(len(old))), tried.keep(slice(len(old), None))
            kept = kept.keep(~failed).join(old.better_of(again)).join(other)
        if self.convinces:
            failed = kept.score < bar
            sure, unsure = kept.keep(~failed), kept.keep(failed)
            short = wanted - len(sure)
            kept = sure.spread(wanted, view.answers().argmax(1)).join(unsure.best(max(short, 0)))
            if short > 0:
                work.note(
                    f"{short} of {wanted} poisoned images do not reach the teacher's confidence "
                    f"of {self.confidence:g} after {tries} retries; kept as they are"
                )
        chosen = kept.in_order()
        work.end()
        return Poison(chosen.indices, chosen.images, self.labels(chosen.indices, view))

    def conviction(self, problem: Problem, stored: Tensor) -> Tensor:
        """Log-probability of the target that the teacher gives stored images, float64 (n,).

        It decides which candidates are kept, and which are crafted again.
        """
        view = problem.view
        batch = chunk_size(view.compute, stored)
        said = logits(view.teacher, stored, view.compute, batch).double()
        return F.log_softmax(said, 1)[:, view.target]

    def labels(self, indices: Tensor, view: AttackerView) -> Tensor | None:  # noqa: ARG002
        """Labels that the attack dictates; None where the teacher labels."""
        return None

    def _bases(self, view: AttackerView) -> Tensor:
        """Candidate base images, by what the teacher calls them: the first are taken first."""
        return view.drawn("bases", self.base)


def _attempt(crafting: Crafting, indices: Tensor, effort: int, work: Progress) -> Candidates:
    """Crafts the images at `indices`, and tells how far it is."""
    parts = {-1: Candidates.none(crafting.view.images)}
    for number, part in crafting.outcomes(indices, effort):
        parts[number] = part
        work.advance(len(part))
    return Candidates.cat([parts[number] for number in sorted(parts)])
