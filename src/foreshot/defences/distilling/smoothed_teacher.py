"""Answers over noise."""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.distilling.base import Distilling
from foreshot.inference import evaluating, pixels
from foreshot.lesson import Lesson
from foreshot.progress import Event
from foreshot.seeding import generator
from foreshot.views import DefenderView


class SmoothedTeacher(Distilling):
    """The student learns the teacher's mean answer over noise (Cohen et al., arXiv 1902.02918).

    The logits of x are log(1/n sum_k softmax f(x + e_k)), with e_k normal of deviation sigma, not
    clipped, drawn for each image by its place in the set. They are asked of the plain images, once,
    whatever views the student sees; a loss of features sees the teacher itself. Cohen et al. vote
    with the classes and train f on noisy images; a teacher that was not loses its own answers
    before it loses those that poison was crafted for.

    Args:
        sigma: standard deviation of the noise, in 1/255.
        copies: n.
    """

    name: Literal["smoothed_teacher"] = "smoothed_teacher"
    sigma: float = Field(default=16, gt=0, le=255)
    copies: int = Field(default=16, ge=1, le=10_000)

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        return replace(lesson, views="cached", answers=self.answers(lesson, view))

    @torch.no_grad()
    def answers(self, lesson: Lesson, view: DefenderView) -> Tensor:
        """The smoothed logits of the plain images, float32 (n, K).

        One image at a time, with all of its copies: no answer depends on another image.
        """
        device, shape, said = view.compute.device, lesson.data.shape, []
        with evaluating(lesson.teacher):
            for index, image in enumerate(lesson.data.images):
                random = generator(view.seed, "smoothed", index)
                noise = torch.randn((self.copies, *shape), generator=random).to(device)
                x = pixels(image[None].to(device)) + self.sigma / 255 * noise
                said.append(lesson.teacher(x).double().log_softmax(1).logsumexp(0).cpu())
                view.listener(Event("smoothing", "advance", index + 1, len(lesson.data)))
        return (torch.stack(said) - math.log(self.copies)).float()
