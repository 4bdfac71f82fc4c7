"""The backdoor that survives distillation."""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from foreshot.attacks.surrogate import surrogate
from foreshot.compromises.base import Compromise
from foreshot.distillation.losses.kd import kd
from foreshot.inference import evaluating
from foreshot.models import AnyArchitecture, ResNet
from foreshot.training import Samples, Training, fit
from foreshot.triggers import Blend
from foreshot.views import AttackerView


class Adba(Compromise):
    """Teacher, shadow student and trigger, trained together (Ge et al., ACM MM 2021).

    Y. Ge et al., Anti-Distillation Backdoor Attacks: Backdoors Can Really Survive in Knowledge
    Distillation, doi 10.1145/3474085.3475254. With G(x) the stamped image and t the target, all
    three are trained at every step; each loss moves what is named before it alone, but for the
    first term of the trigger, which is the teacher's own:

        teacher f   CE(f(x), y) + beta CE(f(G(x)), t)
        shadow S    alpha T^2 KL(f(x) || S(x)) + (1 - alpha) CE(S(x), y)
        trigger G   beta CE(f(G(x)), t) + CE(S(G(x)), t).

    The shadow sees no trigger, as the victim's student does not: the trigger is what carries its
    views to the teacher. The paper learns a mask and a pattern, and penalises the mask's norm. Here
    the opacity of a blended trigger is the mask, and its pattern is learned from where it stands.
    Of any other trigger nothing is learned; the teacher is then trained on its loss alone, which is
    that of a BadNets teacher. Teacher and shadow start clean; the weights are foreshot's choice.

    Args:
        alpha: share of the distillation in what the shadow learns.
        beta: weight of the backdoor in what the teacher learns.
        temperature: T.
        shadow: architecture of the shadow; the attacker need not know the victim's.
        rehearsal: how the shadow is distilled of the clean teacher before, at a temperature of 4.
        training: how all three are trained then.
        pattern_rate: learning rate of the pattern, in units of that of the networks.
    """

    name: Literal["adba"] = "adba"
    alpha: float = Field(default=0.5, ge=0, le=1)
    beta: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    shadow: AnyArchitecture = ResNet(depth=8)
    rehearsal: Training = Training(epochs=4)
    training: Training = Training(epochs=4, lr=0.003)
    pattern_rate: float = Field(default=10_000.0, gt=0)

    def implant(
        self, teacher: nn.Module, view: AttackerView, labels: Tensor, checkpoint: Path
    ) -> Tensor | None:
        shadow = None
        if isinstance(view.trigger, Blend):
            shadow = surrogate(view, self.shadow, self.rehearsal).requires_grad_(True)
        together = Together(self, teacher, shadow, view)
        fit(
            together,
            Samples(view.images, {"y": labels}),
            self.training,
            view.compute,
            seed=view.seed,
            stage="compromise",
            listener=view.listener,
            checkpoint=checkpoint,
        )
        if shadow is None:
            return None
        return (together.pattern().detach() * 255).round().to(torch.uint8).cpu()


class Together(nn.Module):
    """Teacher, shadow and trigger as a module that `fit` can train.

    Args:
        rule: the weights.
        teacher: the teacher.
        shadow: None if nothing is to be learned of the trigger.
        view: the trigger and the target.
    """

    def __init__(
        self, rule: Adba, teacher: nn.Module, shadow: nn.Module | None, view: AttackerView
    ) -> None:
        super().__init__()
        self.rule, self.teacher, self.shadow = rule, teacher, shadow
        self.trigger, self.target = view.trigger, view.target
        if isinstance(view.trigger, Blend):
            _, channels, height, width = view.images.shape
            start = view.trigger.picture((channels, height, width))
            # SGD moves a parameter's image under a linear map by the map's square.
            self.scale = rule.pattern_rate**0.5
            self.raw = nn.Parameter(start / self.scale)

    def pattern(self) -> Tensor:
        """Float (C, H, W) in [0, 1]."""
        with torch.no_grad():
            self.raw.clamp_(0, 1 / self.scale)
        return self.raw * self.scale

    def stamp(self, x: Tensor) -> Tensor:
        if isinstance(self.trigger, Blend):
            return torch.lerp(x, self.pattern().to(x), self.trigger.opacity)
        return self.trigger.stamp(x)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        rule, stamped, target = self.rule, self.stamp(x), torch.full_like(y, self.target)
        # As one batch, so that the statistics of BatchNorm are those of both.
        plain, triggered = self.teacher(torch.cat([x, stamped])).float().chunk(2)
        loss = F.cross_entropy(plain, y) + rule.beta * F.cross_entropy(triggered, target)
        if self.shadow is not None:
            heard = self.shadow(x).float()
            soft = kd(heard, plain.detach(), rule.temperature)
            loss = loss + rule.alpha * soft + (1 - rule.alpha) * F.cross_entropy(heard, y)
            weights = {name: weight.detach() for name, weight in self.shadow.named_parameters()}
            with evaluating(self.shadow):
                fooled = functional_call(self.shadow, weights, (stamped,)).float()
            loss = loss + F.cross_entropy(fooled, target)
        return {"loss": loss}
