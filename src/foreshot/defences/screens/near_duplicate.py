"""The same small pattern in many images."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import Screen, margin
from foreshot.defences.pool import Pool
from foreshot.errors import ForeshotError

ROWS, PLACES = 128, 64
"""Images and places that are compared at a time: what they take stays in the processor's cache."""


class NearDuplicate(Screen):
    """Images of one answer share a pattern that others lack (Wu et al., arXiv 2504.21323).

    The trigger that the paper puts on its poison is at the same place in each. For each window w of
    `size` pixels a side, a kernel density estimate exp(-|w(x) - w(x')|^2 / (2 b^2)), with the mean
    square over the window, counts the images x' like x there: rho_in among those with the same
    answer of the teacher, rho_out among the others. The score is the largest
    log((rho_in + 1 / k) / (rho_out + 1 / k)) of any window.

    Args:
        size: of the windows, in pixels; one that lies within the trigger sees nothing else.
        bandwidth: b, in 1/255.
        compared: k, the number of images that are compared with on each side, if there are so
            many; those at even steps of the teacher's margin are.
    """

    name: Literal["near_duplicate"] = "near_duplicate"
    size: int = Field(default=3, ge=1)
    bandwidth: float = Field(default=8, gt=0)
    compared: int = Field(default=128, ge=1)

    def suspicion(self, pool: Pool) -> Tensor:
        if self.size > (side := min(pool.view.transfer.shape[1:])):
            raise ForeshotError(
                f"screen {self.name}: expected a size of at most the images' {side} pixels, "
                f"found {self.size}"
            )
        said = pool.teacher.said
        order = margin(pool.teacher.logits, said).argsort(stable=True)
        scores = torch.zeros(len(pool), dtype=torch.float64)
        for label in said.unique():
            mine = said[order] == label
            same, other = (spaced(order[side], self.compared) for side in (mine, ~mine))
            if len(same) < 2 or not len(other):
                continue
            near, far = (self.windows(pool.picked(side)) for side in (same, other))
            for part in order[mine].split(ROWS):
                itself = (part[:, None] == same).sum(1)
                windows = self.windows(pool.picked(part))
                inside = (density(windows, near) - itself) / (len(same) - itself)
                outside = density(windows, far) / len(other)
                ratio = (inside + 1 / self.compared) / (outside + 1 / self.compared)
                scores[part] = ratio.log().amax(0).double()
        return scores

    def windows(self, images: Tensor) -> Tensor:
        """All windows of images, (P, n, d), scaled so that the kernel is exp(-|w - w'|^2 / 2)."""
        windows = F.unfold(images.float(), self.size).permute(2, 0, 1).contiguous()
        return windows / (self.bandwidth * windows.shape[2] ** 0.5)


def density(mine: Tensor, theirs: Tensor) -> Tensor:
    """sum_j exp(-|mine_i - theirs_j|^2 / 2) at each place: (P, n, d), (P, m, d) -> (P, n)."""
    sums = []
    room = torch.empty(PLACES, mine.shape[1], theirs.shape[1])  # fresh memory costs more than exp
    for a, b in zip(mine.split(PLACES), theirs.split(PLACES), strict=True):
        # -|a - b|^2 / 2 = a b - |a|^2 / 2 - |b|^2 / 2
        kernel = torch.baddbmm(-b.square().sum(2)[:, None] / 2, a, b.mT, out=room[: len(a)])
        kernel -= a.square().sum(2, keepdim=True) / 2
        # Below exp(-30), which is nothing here, numbers would become denormal, and slow.
        sums.append(kernel.clamp_(min=-30).exp_().sum(2))
    return torch.cat(sums)


def spaced(indices: Tensor, count: int) -> Tensor:
    """`count` of the indices at even steps, or all of them if there are no more."""
    if len(indices) <= count:
        return indices
    return indices[torch.arange(count) * len(indices) // count]
