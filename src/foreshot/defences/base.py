"""The family of screens: each gives every image of the transfer set a score, before distilling."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foreshot.defences.pool import Need, Pool
from foreshot.errors import ForeshotError
from foreshot.family import Member
from foreshot.views import DefenderView

WANTED: dict[Need, str] = {
    "clean": "a clean set of the defender's (view.clean)",
    "gradient": "a teacher whose answers have a gradient in the image",
    "labels": "labels of the transfer set, and of the clean set if there is one",
    "student": "a student (view.student; in an audit, distil)",
    "second": "a second teacher (view.second)",
}


@dataclass(frozen=True, eq=False)
class Scores:
    """How suspicious images are; higher is more.

    Args:
        transfer: of each image of the transfer set, float64 (N,).
        clean: of the images that the defender trusts and set aside to compare with, float64 (n,);
            n is 0 if there are none.
    """

    transfer: Tensor
    clean: Tensor


class Defence(Member):
    """What a defender does against poison; its kind says when."""

    kind: ClassVar[Literal["screen", "distilling", "repair", "monitor"]]
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it needs beside the transfer set and the teacher."""

    def uses(self, lacks: frozenset[Need] = frozenset()) -> frozenset[Need]:  # noqa: ARG002
        """What it looks at, of what there is beside `lacks`: what it needs, and perhaps more."""
        return self.needs


class Screen(Defence):
    """A screen scores a pool of images; which of them the defender trusts it does not know."""

    kind = "screen"

    @abstractmethod
    def suspicion(self, pool: Pool) -> Tensor:
        """A score of each image, float64 (len(pool),), higher = more suspicious.

        It is deterministic, and goes with its image when the pool is in another order.
        """

    def check(self, lacks: frozenset[Need]) -> None:
        """Refuses a view that lacks what the screen needs."""
        missing = sorted(self.needs & lacks)
        if missing:
            wanted = " and ".join(WANTED[need] for need in missing)
            raise ForeshotError(f"screen {self.title}: expected {wanted}, found none")

    def score(self, view: DefenderView) -> Scores:
        """Scores of the transfer set, and of clean images that were scored alike.

        Raises:
            ForeshotError: the view lacks what the screen needs.
        """
        self.check(view.pool.lacks)
        scores = self.suspicion(view.pool)
        return Scores(*scores.split([len(view.transfer), len(scores) - len(view.transfer)]))


class GroupScreen(Screen):
    """A screen that looks at the student's features within each group of the teacher's answers."""

    needs: ClassVar[frozenset[Need]] = frozenset({"student"})

    @abstractmethod
    def within(self, features: Tensor) -> Tensor:
        """Scores (n,) of a group's features, float64 (n, D)."""

    def suspicion(self, pool: Pool) -> Tensor:
        scores = torch.zeros(len(pool), dtype=torch.float64)
        for label in pool.teacher.said.unique():
            group = pool.teacher.said == label
            scores[group] = self.within(pool.student.features[group].double())
        return scores


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the best other class beats `labels` (N,) in logits (N, K): float64 (N,)."""
    own = logits.double().gather(1, labels[:, None])
    return (logits.double().scatter(1, labels[:, None], -torch.inf).amax(1, True) - own)[:, 0]
