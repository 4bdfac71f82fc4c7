"""The teacher's answer under small changes."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import Screen, margin
from foreshot.defences.changing import Changing, Small
from foreshot.defences.pool import Pool
from foreshot.seeding import generator
from foreshot.transforms import noise, shift

Change = Small | Literal["noise", "shift"]
EVERY: tuple[Change, ...] = ("jpeg", "median", "blur", "depth", "noise", "shift")


class TeacherConsistency(Changing, Screen):
    """Small changes revert what the teacher says of poison (Xu et al., arXiv 1704.01155).

    With c = argmax f(x) and m(z) = max_{j != c} z_j - z_c, the score is the mean over changes T of
    m(f(T(x))) - m(f(x)): how far the answer falls behind. Xu et al. take the largest change of the
    softmax instead, where a hesitant answer to a clean image looks like a reverted one; that
    changes of logits tell them apart is what Roth et al. found of noise (arXiv 1902.04818).

    Args:
        changes: which, of `jpeg`, `median` (3 x 3), `blur` (Gaussian), `depth` (fewer bits),
            `noise` (Gaussian, the same for each image), `shift` (down and to the right, edges
            repeated).
        level: standard deviation of the noise, in 1/255.
        pixels: by which images are shifted.
    """

    name: Literal["consistency"] = "consistency"
    changes: tuple[Change, ...] = Field(default=EVERY, min_length=1)
    level: float = Field(default=8, gt=0, le=128)
    pixels: int = Field(default=1, ge=1, le=8)

    def suspicion(self, pool: Pool) -> Tensor:
        before = margin(pool.teacher.logits, pool.teacher.said)
        scores = torch.zeros(len(pool), dtype=torch.float64)
        for change in self.changes:
            after = pool.asked(pool.view.teacher, lambda x, c=change: self.changed(x, c, pool))
            scores += (margin(after, pool.teacher.said) - before) / len(self.changes)
        return scores

    def changed(self, x: Tensor, change: Change, pool: Pool) -> Tensor:
        """Images float (n, C, H, W) after a change."""
        match change:
            case "noise":
                return noise(x, self.level / 255, generator(pool.view.seed, "screens", "noise"))
            case "shift":
                return shift(x, self.pixels, self.pixels)
            case _:
                return self.small(x, change)
