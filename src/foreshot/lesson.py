"""What a student is distilled on, and how: what a defence may change."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

from torch import Tensor, nn

from foreshot.augment import Augmentation
from foreshot.data.base import ImageSet

Views = Literal["cached", "requery"]


@dataclass(frozen=True, eq=False)
class Lesson:
    """One student's lesson.

    Args:
        data: the images, uint8 (n, C, H, W), with their labels if they have any.
        teacher: whose answers the student learns.
        augment: the views that the student sees.
        views: whether the teacher sees the same view (`requery`), or the plain image once.
        dictated: classes that an attacker says in the teacher's stead, or -1, int64 (n,); None if
            the attacker says nothing.
        answers: what `teacher` says of the plain images, float (n, K), if that is known already.
        weights: the share of the epochs in which each image is seen, float (n,) in [0, 1]; None is
            all of them.
    """

    data: ImageSet
    teacher: nn.Module
    augment: Augmentation
    views: Views
    dictated: Tensor | None = None
    answers: Tensor | None = None
    weights: Tensor | None = None

    def select(self, kept: Tensor) -> Self:
        """The lesson of some of the images, by their indices, int64 (m,)."""
        per_image = ("dictated", "answers", "weights")
        some = {name: t[kept] for name in per_image if (t := getattr(self, name)) is not None}
        return replace(self, data=self.data.select(kept), **some)


class Change(Protocol):
    """What a defence makes of a lesson before the student is distilled."""

    @property
    def key(self) -> dict[str, Any]:
        """All that the change depends on, as JSON values."""
        ...

    def __call__(self, lesson: Lesson) -> Lesson:
        """The changed lesson."""
        ...
