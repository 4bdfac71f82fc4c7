"""What a student is distilled on, and how: what a defence may change."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from foreshot.augment import STRONG, Augmentation
from foreshot.compute import Compute
from foreshot.data.base import ImageSet
from foreshot.distillation import Distiller
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.training import Samples

Views = Literal["cached", "requery"]


@dataclass(frozen=True, eq=False)
class Lesson:
    """One student's lesson.

    Args:
        data: the images, uint8 (n, C, H, W), with their labels if they have any.
        teacher: whose answers the student learns.
        augment: the views that the student sees.
        views: whether the teacher sees the same view (`requery`), or the plain image once
            (`cached`; for terms that compare features it sees the student's view all the same).
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

    def joined(self, more: ImageSet) -> Self:
        """The lesson with other images after its own, of which the teacher says what they are."""
        assert self.weights is None
        dictated = self.dictated
        if dictated is not None:
            dictated = torch.cat([dictated, dictated.new_full((len(more),), -1)])
        return replace(self, data=self.data.joined(more), dictated=dictated, answers=None)

    def samples(self, distiller: Distiller, compute: Compute) -> Samples:
        """What the student is trained on: the images, and what its distiller takes beside them.

        Raises:
            ForeshotError: the distiller needs labels, and there are none.
        """
        data, targets, asked = self.data, {}, None
        if self.views == "cached" or self.augment == "none":
            answers = self.answers
            if answers is None:
                answers = logits(self.teacher, data.images, compute)
            targets["teacher_logits"] = answers
        elif self.augment not in STRONG and not any(term.at for term in distiller.terms):
            asked = self.teacher
        if self.dictated is not None:
            targets["dictated"] = self.dictated
        if "y" in distiller.needs:
            if data.labels is None:
                raise ForeshotError(
                    "distillation: the set has no labels; expected ce_weight 0 and losses "
                    "without labels, or with labels: teacher"
                )
            targets["y"] = data.labels
        if "index" in distiller.needs:
            targets["index"] = torch.arange(len(data))
        return Samples(data.images, targets, asked, self.weights)


class Change(Protocol):
    """What a defence makes of a lesson before the student is distilled."""

    @property
    def key(self) -> dict[str, Any]:
        """All that the change depends on, as JSON values."""
        ...

    def __call__(self, lesson: Lesson) -> Lesson:
        """The changed lesson."""
        ...


@dataclass(frozen=True, eq=False)
class Beside:
    """The lesson of a student for screens to look at: clean images that are scored are in it.

    Args:
        clean: those images.
    """

    clean: ImageSet

    @property
    def key(self) -> dict[str, Any]:
        """The digest of the images."""
        return {"beside": self.clean.digest}

    def __call__(self, lesson: Lesson) -> Lesson:
        """The lesson with the images after its own."""
        return lesson.joined(self.clean)
