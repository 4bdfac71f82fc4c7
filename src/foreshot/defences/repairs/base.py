"""The family of repairs: a student that may be poisoned is mended with images that are trusted."""

from abc import abstractmethod
from typing import ClassVar

from foreshot.defences.base import Defence
from foreshot.defences.pool import Need
from foreshot.models.base import Normalized
from foreshot.views import DefenderView


class Repair(Defence):
    """A repair changes the weights of a student; its architecture stays."""

    kind = "repair"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    @abstractmethod
    def mend(self, student: Normalized, view: DefenderView) -> None:
        """Mends a student in place.

        Args:
            student: a copy of `view.student` whose every parameter can be trained.
            view: what the defender knows; `view.student` is the student as it was distilled, and
                all of `view.clean` may be used.
        """
