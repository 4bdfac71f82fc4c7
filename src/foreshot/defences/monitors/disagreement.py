"""Inputs on which student and teacher part."""

from dataclasses import replace
from typing import Literal

from torch import Tensor

from foreshot.defences.monitors.base import Monitor, screened
from foreshot.defences.pool import there
from foreshot.defences.screens.second_teacher import SecondTeacher
from foreshot.views import DefenderView


class Disagreement(Monitor):
    """The student is sure of what its clean teacher denies (foreshot's own).

    With c the student's answer and m(z) = max_{j != c} z_j - z_c, the score is
    m(teacher(x)) - m(student(x)), as in the screen `second_teacher`: a trigger that the student has
    learned moves its teacher, which is clean, not at all. The price is what the student was to
    save: the teacher is asked about each input, or about a sample of them.
    """

    name: Literal["disagreement"] = "disagreement"

    def suspicion(self, images: Tensor, view: DefenderView) -> Tensor:
        swapped = replace(view, teacher=there(view.student), second=view.teacher)
        return screened(SecondTeacher(), images, swapped)
