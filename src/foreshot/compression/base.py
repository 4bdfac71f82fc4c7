"""The family of compressions: the student is the teacher, made smaller, and then distilled."""

from abc import abstractmethod
from copy import deepcopy

from foreshot.family import Member
from foreshot.models import AnyArchitecture
from foreshot.models.base import Normalized


class Compression(Member):
    """How a teacher becomes a student of its own.

    `start` makes the student; it is then distilled, which recovers what the compression cost; and
    `finish` leaves plain weights of `architecture`.
    """

    @abstractmethod
    def start(self, teacher: Normalized) -> Normalized:
        """A compressed copy whose every parameter can be trained; the teacher stays as it is."""

    def finish(self, student: Normalized) -> None:
        """Makes the compression of a trained student, in place, part of its weights."""

    def architecture(self, teacher: AnyArchitecture) -> AnyArchitecture:
        """What the finished student is to be saved as."""
        return teacher


def trainable(teacher: Normalized) -> Normalized:
    """A copy of the (frozen) teacher whose parameters can be trained."""
    return deepcopy(teacher).requires_grad_(True)
