"""Triggers that the attacker computes, of networks and images of his own."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from foreshot.errors import ForeshotError
from foreshot.files import replacing
from foreshot.inference import pixels
from foreshot.models import AnyArchitecture, ResNet
from foreshot.progress import Event
from foreshot.seeding import generator
from foreshot.training import Training
from foreshot.triggers.blend import Blend

if TYPE_CHECKING:  # views knows triggers
    from foreshot.views import AttackerView

Effect = Callable[[Tensor, Tensor], Tensor]
"""Images without and with the trigger, float (n, C, H, W) -> what is minimised over the pattern."""


class Learned(Blend):
    """A pattern, blended into the whole image, that is learned once the teacher is trained.

    x' = (1 - opacity) x + opacity pattern: no pixel moves by more than the opacity, which is the
    budget of visibility. The pattern starts as a random one; each step moves it by the sign of the
    gradient of what the subclass minimises over a batch of the transfer set, and the steps shrink
    linearly to zero. A run stores it as a picture.

    Args:
        steps: gradient steps.
        step: length of the first one; the pattern's range is [0, 1].
        batch: images at a step.
    """

    steps: Annotated[int, Field(ge=1)] = 200
    step: Annotated[float, Field(gt=0, le=1)] = 0.1
    batch: Annotated[int, Field(ge=2)] = 128

    @abstractmethod
    def effect(self, view: "AttackerView") -> Effect:
        """What is minimised over the pattern, for batches on the device."""

    def pool(self, view: "AttackerView") -> Tensor:
        """Indices of what it is learned on: images that the teacher calls another class."""
        return view.drawn("trigger", "non_target")

    def learn(self, view: "AttackerView") -> Tensor:
        """The pattern, uint8 (C, H, W)."""
        effect, pool = self.effect(view), self.pool(view)
        random = generator(view.seed, "trigger", "batches")
        channels, height, width = view.images.shape[1:]
        pattern = self.picture((channels, height, width)).to(view.compute.device)
        view.listener(Event("trigger", "start", 0, self.steps))
        for number in range(self.steps):
            drawn = pool[torch.randint(len(pool), (self.batch,), generator=random)]
            x = pixels(view.images[drawn].to(view.compute.device))
            pattern = pattern.detach().requires_grad_()
            with view.compute.autocast():
                value = effect(x, torch.lerp(x, pattern, self.opacity))
            (gradient,) = torch.autograd.grad(value, pattern)
            length = self.step * (1 - number / self.steps)
            pattern = (pattern.detach() - length * gradient.sign()).clamp(0, 1)
            view.listener(Event("trigger", "advance", number + 1, self.steps))
        view.listener(Event("trigger", "end", self.steps, self.steps))
        return (pattern * 255).round().to(torch.uint8).cpu()

    def stamp(self, x: Tensor) -> Tensor:  # noqa: ARG002
        raise ForeshotError(
            f"trigger {self.title}: expected a pattern that was learned, found none; a run learns "
            "it, and its folder holds it"
        )


class Rehearsed(Learned):
    """A pattern that is learned with a student that the attacker distils on the clean set.

    Args:
        student: architecture of that student; the attacker need not know the victim's.
        training: how it is distilled.
    """

    student: AnyArchitecture = ResNet(depth=8)
    training: Training = Training(epochs=4)

    def rehearsed(self, view: "AttackerView") -> nn.Module:
        """That student, frozen."""
        from foreshot.attacks.surrogate import surrogate  # attacks knows triggers

        return surrogate(view, self.student, self.training)


def save_picture(path: Path, pattern: Tensor) -> None:
    """Writes a pattern, uint8 (C, H, W), as PNG, grey or in colour.

    Raises:
        ForeshotError: it has another number of channels.
    """
    check_picture(pattern.shape)
    levels = pattern[0] if len(pattern) == 1 else pattern.permute(1, 2, 0)
    with replacing(path) as part:
        Image.fromarray(levels.numpy()).save(part, "PNG")


def check_picture(shape: Sequence[int]) -> None:
    """Refuses patterns (C, H, W) that a picture does not hold."""
    if shape[0] not in (1, 3):
        raise ForeshotError(f"trigger: expected images of 1 or 3 channels, found {shape[0]}")
