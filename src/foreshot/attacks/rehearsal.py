"""What attacks have in common that distil students of their own first."""

from dataclasses import replace
from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from foreshot.attacks.base import Attack
from foreshot.attacks.surrogate import surrogate
from foreshot.inference import logits
from foreshot.models import AnyArchitecture, ResNet
from foreshot.poison import Poison
from foreshot.progress import Event, Listener
from foreshot.training import Training
from foreshot.triggers.base import stamp_uint8
from foreshot.views import AttackerView


class Rehearsal(Attack):
    """An attack that distils surrogate students, and crafts with what they have learned.

    Those of the first round are distilled on the clean set, those of each further round on the
    poison of the round before; all of them are heeded.

    Args:
        rounds: of distilling surrogates and crafting.
        student: architecture of the surrogates; the attacker need not know the victim's.
        pool: further architectures: each round distils one surrogate of each kind.
        training: how they are distilled, at a temperature of 4.
        resisting: share of the base images that shall be such as the last surrogate, which has
            learned from poison, does not take for the target yet when they are stamped: from the
            second round on, of which there has to be one. None takes them as they come.
    """

    rounds: int = Field(default=1, ge=1, le=20)
    student: AnyArchitecture = ResNet(depth=8)
    pool: tuple[AnyArchitecture, ...] = ()
    training: Training = Training(epochs=4)
    resisting: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _resistance_is_to_poison(self) -> Self:
        if self.resisting is not None and self.rounds < 2:
            raise ValueError("resisting needs rounds of 2 or more")
        return self

    def craft(self, view: AttackerView) -> Poison:
        view = replace(view, teacher_logits=view.answers())
        poison = None
        for number in range(self.rounds):
            kinds = self.student, *self.pool
            students = [
                surrogate(view, kind, self.training, poison, number * len(kinds) + place)
                for place, kind in enumerate(kinds, 1)
            ]
            view = replace(view, students=(*view.students, *students))
            if number + 1 < self.rounds:
                # What teaches a surrogate alone need not convince every time, nor is that told.
                attack = self.model_copy(update={"retries": 0})
                poison = Attack.craft(attack, replace(view, listener=_without_notes(view.listener)))
        return super().craft(view)

    def _bases(self, view: AttackerView) -> Tensor:
        """By turns images that resist and others, so that however many are taken hold the share."""
        order, share = self._ranked(view), self.resisting
        if share is None or len(view.students) <= len(self.pool) + 1:
            return order  # those of the first round have seen no poison
        stamp = partial(stamp_uint8, view.trigger)
        said = logits(view.students[-1], view.images[order], view.compute, change=stamp)
        resists = said.argmax(1) != view.target
        hard, easy = order[resists], order[~resists]
        turns = [
            (torch.arange(len(hard)) + 0.5) / share,
            (torch.arange(len(easy)) + 0.5) / (1 - share),
        ]
        return torch.cat([hard, easy])[torch.cat(turns).argsort(stable=True)]

    def _ranked(self, view: AttackerView) -> Tensor:
        """Candidate base images in the order of the attack itself."""
        return super()._bases(view)


def _without_notes(listener: Listener) -> Listener:
    def tell(event: Event) -> None:
        if event.kind != "note":
            listener(event)

    return tell
