"""Images, cleaned before anybody learns from them."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from foreshot.data.base import ImageSet
from foreshot.defences.changing import Changing, Small
from foreshot.defences.distilling.base import Distilling
from foreshot.defences.pool import BATCH
from foreshot.inference import pixels
from foreshot.lesson import Lesson
from foreshot.levels import to_uint8
from foreshot.transforms import smooth
from foreshot.views import DefenderView


class Purification(Changing, Distilling):
    """Images are cleaned before teacher and student see them (Guo et al., arXiv 1711.00117).

    x <- T_k(... T_1(x)), rounded to 8 bits. What the perturbation did to the teacher's answer is
    to be undone; the trigger mostly stays, with the right answer. The student learns on purified
    images alone, and is asked about images as they come. A larger weight undoes more, and leaves
    less to learn from.

    Args:
        changes: T_1 to T_k, of `jpeg`, `median` (3 x 3), `blur` (Gaussian), `depth` (fewer bits)
            and `variation` (least total variation, each channel by itself).
        weight: of the total variation against half the squared distance, pixels in [0, 1].
    """

    name: Literal["purification"] = "purification"
    changes: tuple[Small | Literal["variation"], ...] = Field(default=("variation",), min_length=1)
    weight: float = Field(default=0.1, gt=0, le=10)

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        cleaned, data = [], lesson.data
        for part in data.images.split(BATCH):
            x = pixels(part.to(view.compute.device))
            for change in self.changes:
                x = smooth(x, self.weight) if change == "variation" else self.small(x, change)
            cleaned.append(to_uint8(x).cpu())
        images = ImageSet(torch.cat(cleaned), data.labels, data.classes)
        return replace(lesson, data=images)
