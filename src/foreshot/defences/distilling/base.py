"""The family of defences in distillation: other images, another teacher, other weights."""

from abc import abstractmethod

from torch import nn

from foreshot.defences.base import Defence
from foreshot.lesson import Lesson
from foreshot.views import DefenderView


class Distilling(Defence):
    """A defence that changes what the student is distilled on, or from whom."""

    kind = "distilling"

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:  # noqa: ARG002
        """The lesson that the student gets instead.

        Args:
            lesson: that of an undefended student, without what the defender may not see, and
                without answers. All images stay, in their order.
            view: what the defender knows.
        """
        return lesson


class OwnTeacher(Distilling):
    """A defence whose student learns from a teacher of the defender's own.

    It is trained on the data and the schedule of the teacher.
    """

    @abstractmethod
    def supervised(self, network: nn.Module) -> nn.Module:
        """The network as a module that `fit` can train on images and labels `y`."""
