"""Images on their way through an attack, chunk by chunk: here, or in the workers of an executor.

A worker is given once what crafting takes, without the transfer set, and then one chunk after the
other. What comes of a chunk depends on its images and their global indices, and on nothing else.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from foreshot.attacks.folding import frozen
from foreshot.attacks.problem import Chunk, Problem
from foreshot.compute import Compute, with_threads
from foreshot.errors import ForeshotError
from foreshot.executor import Failure, Serial
from foreshot.progress import Event
from foreshot.views import AttackerView

if TYPE_CHECKING:
    from foreshot.attacks.base import Attack

CHUNK = 64
"""Images that are crafted together. Fixed and padded, so that no result depends on the split."""
ON_GPU = 512
"""As many on a GPU, of 32 x 32 pixels: on an H100 they take less than twice as long as `CHUNK`. Of
larger images fewer, but `CHUNK`."""


def chunk_size(compute: Compute, images: Tensor) -> int:
    """How many of such images, (..., C, H, W), are crafted together."""
    if compute.device.type != "cuda":
        return CHUNK
    return max(CHUNK, min(ON_GPU, ON_GPU * 32**2 // images.shape[-2:].numel()))


@dataclass(frozen=True, eq=False)
class Candidates:
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

    def __len__(self) -> int:
        return len(self.indices)

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


@dataclass(frozen=True, eq=False)
class Crafting:
    """Makes poison of chunks: an attack and all that it takes beside their images.

    Args:
        attack: how they are perturbed.
        view: what the attacker knows; its students are frozen.
        beside: uint8 (m, C, H, W), the further images that the attack asks for.
    """

    attack: "Attack"
    view: AttackerView
    beside: Tensor

    @cached_property
    def teacher(self) -> nn.Module:
        """The one whose gradient is taken."""
        return frozen(self.view.teacher, self.view.compute)

    def __call__(self, chunk: Chunk) -> Candidates:
        """The chunk's images as they are stored; each is the same whichever the others are."""
        attack, count = self.attack, len(chunk.indices)
        # Filled up by repeating: a convolution of another batch size rounds otherwise.
        size = chunk_size(self.view.compute, chunk.images) if attack.convinces else count
        filled = torch.arange(size) % count
        chunk = Chunk(chunk.indices[filled], chunk.images[filled], chunk.effort)
        problem = Problem.pose(chunk, attack, self.view, self.teacher, self.beside)
        stored = problem.store(attack.perturb(problem))
        score = torch.zeros(size, dtype=torch.float64)
        if attack.convinces:
            score = attack.conviction(problem, stored)
        return Candidates(chunk.indices, stored, score).keep(slice(0, count))

    def chunks(self, indices: Tensor, effort: int) -> Iterator[Chunk]:
        """The images at `indices`, in parts that hold nothing of the rest of the set."""
        size = chunk_size(self.view.compute, self.view.images)
        for part in indices.split(size) if len(indices) else ():  # nothing splits into one part
            yield Chunk(part.clone(), self.view.images[part], effort)

    def outcomes(self, indices: Tensor, effort: int) -> Iterator[tuple[int, Candidates]]:
        """Numbers of chunks, and what came of them, in the order in which they end.

        Raises:
            ForeshotError: a worker could not craft its chunk.
        """
        chunks, executor = self.chunks(indices, effort), self.view.executor
        if isinstance(executor, Serial):  # where nothing travels, an error is raised as it is
            yield from enumerate(map(self, chunks))
            return
        apart = replace(self, view=self.view.without_set())
        work = partial(_elsewhere, apart, torch.get_num_threads())
        with closing(executor.map(work, list(chunks), lambda _number: None)) as ended:
            for number, outcome in ended:
                if isinstance(outcome, Failure):
                    error = ForeshotError(f"crafting: {outcome.reason}")
                    error.add_note(outcome.trace)
                    raise error
                yield number, outcome


def _elsewhere(crafting: Crafting, number: int, chunk: Chunk) -> Candidates:
    """Crafts in a worker, with as many threads as there are where the others are put together."""
    with with_threads(number):
        return crafting(chunk)


class Progress:
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
