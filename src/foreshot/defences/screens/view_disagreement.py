"""The teacher's answers to other views of an image."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Pool
from foreshot.seeding import generator
from foreshot.transforms import transform


class ViewDisagreement(Screen):
    """A cached answer contradicts those to augmented views (after Xu et al., arXiv 1704.01155).

    The mean over k views T_k, the same for each image, of KL(softmax(f(x) / T) || softmax(f(T_k x)
    / T)): by how much a student that is taught with cached answers is taught another thing than
    one for whom the teacher is asked again about every view.

    Args:
        views: `crop` (shifted by up to an eighth of the side) or `crop_flip` (and mirrored).
        count: k.
        temperature: T; a high one compares whole answers, and not the likeliest classes alone.
    """

    name: Literal["view_disagreement"] = "view_disagreement"
    views: Literal["crop", "crop_flip"] = "crop"
    count: int = Field(default=8, ge=1, le=1000)
    temperature: float = Field(default=1, gt=0)

    def suspicion(self, pool: Pool) -> Tensor:
        cached = (pool.teacher.logits.double() / self.temperature).log_softmax(1)
        scores = torch.zeros(len(pool), dtype=torch.float64)
        for number in range(self.count):
            key = pool.view.seed, "screens", "view", number
            again = pool.asked(
                pool.view.teacher, lambda x, k=key: transform(x, self.views, generator(*k))
            )
            asked = (again.double() / self.temperature).log_softmax(1)
            scores += (cached.exp() * (cached - asked)).sum(1) / self.count
        return scores
