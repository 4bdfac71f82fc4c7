"""Less of what a teacher with shuffled channels calls the same."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.defences.distilling.base import Distilling
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.lesson import Lesson
from foreshot.models.ensemble import members
from foreshot.seeding import generator
from foreshot.views import DefenderView


class ShufflingVaccine(Distilling):
    """Leaves out what a teacher of shuffled channels answers alike (Hong et al., arXiv 2306.02368).

    A negative control: it assumes a compromised teacher, and asks what of its answers a backdoor
    gives. With f_j the teacher f whose last convolutions take their input channels in a random
    order, and g(x) the mean of the logits of k such f_j, an image is suspicious if

        argmax g(x) = argmax f(x):

    what the teacher has learned of images does not survive the shuffling, the shortcut of a
    backdoor does. A clean teacher has none, whatever the images. As in the authors' code
    (illidanlab/ABD, on out-of-distribution sets), an order counts only if the log of
    KL(f(x) || g(x)) is three deviations below its mean for a share `tail` of the images or more;
    after `trials` orders without, nothing is left out. Leaving out is all that is done here: the
    authors also push the student away from the suspicious answers, and unlearn afterwards what
    turns it on all images (Self-Retrospection), for which there is the repair `i_bau`.

    Args:
        layers: convolutions whose input channels are shuffled, the last ones.
        copies: k.
        tail: share of the images; 0 takes the first order as it is.
        trials: orders that are drawn, one after the other.
        share: of the epochs, in which a suspicious image is seen; 0 is never.
    """

    name: Literal["shuffling_vaccine"] = "shuffling_vaccine"
    layers: int = Field(default=5, ge=1)
    copies: int = Field(default=3, ge=1)
    tail: float = Field(default=0.02, ge=0, le=1)
    trials: int = Field(default=8, ge=1)
    share: float = Field(default=0.0, ge=0, le=1)

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        answers = logits(lesson.teacher, lesson.data.images, view.compute)
        for trial in range(self.trials):
            random = generator(view.seed, self.title, trial)
            others = self.shuffled_answers(lesson, view, random)
            if tail(divergence(answers, others)) >= self.tail:
                alike = others.argmax(1) == answers.argmax(1)
                return replace(lesson, weights=torch.where(alike, self.share, 1.0))
        return lesson

    def shuffled_answers(
        self, lesson: Lesson, view: DefenderView, random: torch.Generator
    ) -> Tensor:
        """The mean logits of shuffled teachers, float32 (n, K)."""
        networks = [shuffled(lesson.teacher, self.layers, random) for _ in range(self.copies)]
        return torch.stack(
            [logits(network, lesson.data.images, view.compute) for network in networks]
        ).mean(0)


def shuffled(teacher: nn.Module, layers: int, random: torch.Generator) -> nn.Module:
    """A copy of a network whose last convolutions take their input channels in another order.

    Of an ensemble those of each member.

    Raises:
        ForeshotError: there is no convolution.
    """
    network = deepcopy(teacher)
    of_each = [
        [layer for layer in member.modules() if isinstance(layer, nn.Conv2d)][-layers:]
        for member in members(network)
    ]
    if not all(of_each):
        raise ForeshotError(
            "defence shuffling_vaccine: expected a teacher with convolutions, "
            f"found {type(teacher).__name__} without"
        )
    for layer in chain.from_iterable(of_each):
        # What they take, and not their weights: these may be made of others, as int8 is.
        order = torch.randperm(layer.in_channels, generator=random).to(layer.weight.device)
        layer.register_forward_pre_hook(partial(_reordered, order))
    return network


def _reordered(order: Tensor, _layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The input of a layer, its channels in that order: a hook before its forward."""
    return (inputs[0][:, order],)


def divergence(answers: Tensor, others: Tensor) -> Tensor:
    """KL of the answers that logits (n, K) give, from those that others give; float64 (n,)."""
    p, q = answers.double().log_softmax(1), others.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def tail(divergences: Tensor) -> float:
    """The share whose logarithm is more than three standard deviations below the mean of all."""
    logs = divergences.clamp(min=1e-12).log()
    return (logs < logs.mean() - 3 * logs.std(correction=0)).double().mean().item()
