"""The family of compromises: a backdoor in the teacher itself, outside the threat model."""

from abc import abstractmethod
from pathlib import Path

from torch import Tensor, nn

from foreshot.family import Member
from foreshot.views import AttackerView


class Compromise(Member):
    """How whoever trains the teacher puts a backdoor into it, which a student is to inherit.

    A reference point: the attacks of foreshot leave the teacher as it is, and change images.
    """

    @abstractmethod
    def implant(
        self, teacher: nn.Module, view: AttackerView, labels: Tensor, checkpoint: Path
    ) -> Tensor | None:
        """Puts the backdoor into a teacher.

        Args:
            teacher: a trainable copy of the clean teacher, changed in place.
            view: the images, the clean teacher, the trigger, the target.
            labels: int64 (N,), of the images.
            checkpoint: a file for the state of what takes long.

        Returns:
            The pattern that the trigger has learned, uint8 (C, H, W); None if it stays as it was.
        """
