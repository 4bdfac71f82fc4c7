"""Crafting for an image that will be changed on the way."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.attacks.base import Problem
from foreshot.attacks.pgd import Objective, Pgd
from foreshot.levels import to_float, to_uint8
from foreshot.seeding import generator
from foreshot.transforms import Transform, transform

Change = Callable[[Tensor], Tensor]
JUDGED = 16
"""Changes by which a finished image is judged, beside itself; not those that it was crafted on."""


class Eot(Pgd):
    """PGD on the expectation over transformations of the image (Athalye et al., arXiv 1707.07397).

    mean over t of CE(f(t(x)) / T, target): the teacher says target of the crops that a distiller
    shows it, or of the image after a defence has compressed or blurred it. Its probability of the
    target, by which images are kept or crafted again, is a mean over such changes as well.

    Args:
        through: the transformations, by turns: crop, crop_flip, shift, noise, blur, median, resize,
            depth, jpeg, or none.
        draws: how many are drawn at each step.
    """

    name: Literal["eot"] = "eot"  # type: ignore[assignment]
    through: Annotated[tuple[Transform, ...], Field(min_length=1)] = ("crop",)
    draws: int = Field(default=2, ge=1, le=64)

    def objective(self, problem: Problem) -> Objective:
        minimised = self.under(problem)

        def expected(x: Tensor, step: int) -> Tensor:
            drawn = range(step * self.draws, (step + 1) * self.draws)
            return torch.stack([minimised(x, self._change(problem, n)) for n in drawn]).mean()

        return expected

    def conviction(self, problem: Problem, stored: Tensor) -> Tensor:
        """As a mean of probabilities: of the stored images, and of what changes make of them."""
        judge = super().conviction
        kinds: list[Transform] = [kind for kind in self.through if kind != "none"]
        said = [judge(problem, stored)]
        for number in range(JUDGED if kinds else 0):
            kind = kinds[number % len(kinds)]
            random = generator(problem.view.seed, "poison", "judged", number)
            said.append(judge(problem, to_uint8(transform(to_float(stored), kind, random))))
        return torch.stack(said).logsumexp(0) - math.log(len(said))

    def under(self, problem: Problem) -> Callable[[Tensor, Change], Tensor]:
        """What is minimised over x if the images are changed so."""
        return lambda x, change: self.loss(problem.logits(change(x)), problem.view.target)

    def _change(self, problem: Problem, number: int) -> Change:
        """The `number`-th change, the same whenever it is called and for whichever images.

        Drawn for the step and not for an image, so no image's poison depends on another's.
        """
        kind, keys = self.through[number % len(self.through)], (problem.effort, number)
        if kind == "none":
            return same
        seed = problem.view.seed
        return lambda x: transform(x, kind, generator(seed, "poison", "through", *keys))


def same(x: Tensor) -> Tensor:
    """No change."""
    return x
