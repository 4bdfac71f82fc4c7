"""A perturbation that teaches the trigger without showing it."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.attacks.base import Problem
from foreshot.attacks.crafting import CHUNK
from foreshot.attacks.pgd import Objective, Pgd
from foreshot.attacks.rehearsal import Rehearsal
from foreshot.compute import Compute
from foreshot.distillation.losses.vectors import vectors
from foreshot.inference import pixels
from foreshot.taps import Taps
from foreshot.triggers.base import stamp_uint8
from foreshot.views import AttackerView, Kind

Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and their labels (N, K) -> the factors of g: error (N, K) and features (N, D + 1)."""


class SleeperAgent(Pgd, Rehearsal):
    """Hidden trigger by gradient matching (Sleeper Agent, Souri et al., arXiv 2106.08970).

    1 - mean over surrogates S of cos(g(x, softmax(f(x) / T)), mean over sources of g(stamp(s), e)),

    with e the target's unit vector and g(x, y) = (softmax(S(x) / T) - y) (phi(x), 1)^T: what the
    cross-entropy's gradient is in the classifier of S, bias and all, whose features are phi. So
    what a student learns from an image without a trigger is what would make it say target of a
    stamped one.

    The paper matches the gradient in all weights, summed over a batch. Here no image may depend on
    another, so the gradient of each is matched by itself, in the classifier alone, where it has
    this closed form. The paper labels its poison with the target; here the teacher labels, so what
    it says of x stands in the gradient. As in the paper, the base images are those of the target
    class with the largest gradient. With more `rounds` than one, students are distilled on the
    poison again, as the paper does four times; each image then depends on the others through them.

    Args:
        layer: of the surrogates, whose output, averaged over its places, is phi.
        sources: how many images that are not the target are stamped.
    """

    name: Literal["sleeper_agent"] = "sleeper_agent"  # type: ignore[assignment]
    rate: float = Field(default=0.01, gt=0, le=1)
    base: Kind = "target"
    steps: int = Field(default=250, ge=1)
    layer: str = "network.layer3"
    sources: int = Field(default=1000, ge=1)

    stamps: ClassVar[bool | None] = False

    def beside(self, view: AttackerView) -> Tensor:
        return view.drawn("sources", "non_target")[: self.sources]

    def objective(self, problem: Problem) -> Objective:
        view = problem.view
        heads = [self._head(student, view.compute) for student in view.students]
        sought = [self._sought(problem, head) for head in heads]

        def labels(x: Tensor) -> Tensor:
            if view.labeller is None:
                return problem.logits(x)
            with view.compute.autocast():
                return view.labeller(x).float()

        def apart(x: Tensor, _step: int) -> Tensor:
            y = F.softmax(labels(x) / self.temperature, 1)
            alike = []
            for head, gradient in zip(heads, sought, strict=True):
                error, features = head(x, y)
                inner = ((error @ gradient) * features).sum(1)
                alike.append(inner / _length(error, features).clamp(min=1e-12) / gradient.norm())
            return (1 - torch.stack(alike).mean(0)).sum()

        return apart

    def _ranked(self, view: AttackerView) -> Tensor:
        pool = super()._ranked(view)
        head = self._head(view.students[0], view.compute)
        y = F.softmax(view.of_labeller().answers() / self.temperature, 1)
        device = view.compute.device
        with torch.no_grad():
            lengths = [
                _length(*head(pixels(view.images[part].to(device)), y[part].to(device)))
                for part in pool.split(CHUNK)
            ]
        return pool[torch.cat(lengths).cpu().argsort(descending=True, stable=True)]

    def _head(self, student: nn.Module, compute: Compute) -> Head:
        taps = Taps(student, [self.layer], "surrogate")

        def head(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            with compute.autocast():
                said = student(x).float()
            features = vectors(taps.collect()[self.layer]).float()
            return F.softmax(said / self.temperature, 1) - y, F.pad(features, (0, 1), value=1.0)

        return head

    @torch.no_grad()
    def _sought(self, problem: Problem, head: Head) -> Tensor:
        """The mean gradient of stamped images to the target, (K, D + 1)."""
        view = problem.view
        classes = view.answers().shape[1]
        wanted = F.one_hot(torch.tensor(view.target, device=view.compute.device), classes)
        gradients = []
        for part in stamp_uint8(view.trigger, problem.beside).split(CHUNK):
            error, features = head(pixels(part.to(view.compute.device)), wanted)
            gradients.append(error.T @ features)
        return torch.stack(gradients).sum(0) / len(problem.beside)


def _length(error: Tensor, features: Tensor) -> Tensor:
    """Norm of each image's gradient, (N,): of an outer product, that of its factors' product."""
    return error.norm(dim=1) * features.norm(dim=1)
