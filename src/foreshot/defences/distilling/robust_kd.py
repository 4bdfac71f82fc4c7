"""A teacher without what clean images do not need."""

from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.compute import Compute
from foreshot.defences.distilling.base import Distilling
from foreshot.defences.pool import BATCH, Need, there
from foreshot.inference import evaluating, logits, pixels
from foreshot.lesson import Lesson
from foreshot.taps import Taps, stages
from foreshot.training import Samples, Training, fit
from foreshot.views import DefenderView


class RobustKD(Distilling):
    """Learns from a teacher whose features vary less (RobustKD, Chen et al., arXiv 2406.03409).

    A negative control: it assumes a compromised teacher, whose backdoor varies its features. The
    map F of each stage is mixed, element by element, with a constant c by a mask m,

        F' = (1 - m) F + m c,    0 <= m <= most,

    and what follows, and the student, get F'. With f' the teacher of mixed features and f the
    teacher as it was, m and c are trained on the defender's clean images to

        min CE(f'(x), argmax f(x)) + weight * mean over the stages of Var F' / Var F,

    from m = most and c the mean of F: what clean images do not need is shrunk to its mean. A clean
    teacher has no backdoor in there; but it becomes another one, on which poison was not crafted,
    and that may help by accident.

    This is a reconstruction of the described mechanism. The mixing is that of the authors' code
    (Xming-Z/RobustKD), which loads masks that were made before; how the two losses are scaled, and
    that the teacher's answers stand for labels, is foreshot's choice. The authors distil features
    and labels; here whatever `distillation` names is learned from the mixed teacher.

    Args:
        most: largest mask, 0 to 1; at 0.2 a backdoor of a teacher of `signs` stays.
        weight: of the variance.
        training: how masks and constants are trained, in passes over the clean images.
    """

    name: Literal["robust_kd"] = "robust_kd"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})
    most: float = Field(default=0.9, ge=0, le=1)
    weight: float = Field(default=1.0, ge=0)
    training: Training = Training(batch=64, lr=10.0, weight_decay=0.0)

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:
        return replace(lesson, teacher=self.detoxified(lesson.teacher, view))

    def detoxified(self, teacher: nn.Module, view: DefenderView) -> nn.Module:
        """A copy of the teacher whose stages give mixed features."""
        images = there(view.clean).images
        module = Detoxification(self, teacher, images, view.compute)
        fit(
            module,
            Samples(images, {"y": logits(teacher, images, view.compute).argmax(1)}),
            self.training,
            view.compute,
            seed=view.seed,
            stage=self.title,
            listener=view.listener,
        )
        return module.bounded().requires_grad_(False)


class Detoxification(nn.Module):
    """A teacher of mixed features, as a module whose masks and constants `fit` can train.

    Args:
        how: the bound of the masks and the weight.
        teacher: the teacher; it stays as it is.
        images: clean images, uint8 (n, C, H, W).
        compute: where the teacher is.
    """

    def __init__(self, how: RobustKD, teacher: nn.Module, images: Tensor, compute: Compute) -> None:
        super().__init__()
        self.how, self.teacher = how, deepcopy(teacher).requires_grad_(False)
        names = stages(self.teacher, how.title)
        self.layers = {name: self.teacher.get_submodule(name) for name in names}
        self.variances = {}
        for name, (mean, variance) in statistics(self.teacher, names, images, compute).items():
            self.variances[name] = variance.mean().item()
            # On the layer itself, so that it stays what the terms of a loss call it.
            layer = self.layers[name]
            layer.register_parameter("mask", nn.Parameter(torch.full_like(mean, how.most)))
            layer.register_parameter("constant", nn.Parameter(mean))
            layer.register_forward_hook(mixed)
        self.taps = Taps(self.teacher, names, "teacher")

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with evaluating(self.teacher):
            answers = self.bounded()(x).float()
        varying = [
            feature.float().var(0).mean() / self.variances[name]
            for name, feature in self.taps.collect().items()
        ]
        loss = F.cross_entropy(answers, y) + self.how.weight * torch.stack(varying).mean()
        return {"loss": loss}

    @torch.no_grad()
    def bounded(self) -> nn.Module:
        """The teacher, its masks within their bounds."""
        for layer in self.layers.values():
            layer.get_parameter("mask").clamp_(0, self.how.most)
        return self.teacher


@torch.no_grad()
def statistics(
    teacher: nn.Module, names: list[str], images: Tensor, compute: Compute
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance over images of each element of the layers' outputs, float32."""
    taps, nothing = Taps(teacher, names, "teacher"), torch.zeros((), device=compute.device)
    totals = dict.fromkeys(names, (nothing, nothing))
    with evaluating(teacher):
        for part in images.split(BATCH):
            teacher(pixels(part.to(compute.device)))
            for name, feature in taps.collect().items():
                wide, (total, squares) = feature.double(), totals[name]
                totals[name] = total + wide.sum(0), squares + wide.square().sum(0)
    found, count = {}, len(images)
    for name, (total, squares) in totals.items():
        mean = total / count
        variance = (squares - count * mean.square()) / max(count - 1, 1)
        found[name] = mean.float(), variance.float()
    return found


def mixed(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """The output of a layer, mixed with its constant: a forward hook."""
    mask, constant = layer.get_parameter("mask"), layer.get_parameter("constant")
    return (1 - mask) * output + mask * constant
