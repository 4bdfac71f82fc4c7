"""Fine-pruning: what sleeps on clean images is cut off, then the rest is tuned."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from foreshot.defences.pool import BATCH, read, there
from foreshot.defences.repairs.tuning import Tuning
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.models.base import Normalized
from foreshot.models.ensemble import members
from foreshot.training import Training
from foreshot.views import DefenderView


class FinePruning(Tuning):
    """Prunes features that sleep on clean images, then tunes (Liu et al., arXiv 1805.12185).

    The channels of the last layer before the classifier, in the order of their mean activity on
    clean images, the least first, are cut off as long as the share of the clean images on which
    student and teacher agree falls by `drop` at most; the student is tuned without them.

    Args:
        drop: by how much the agreement may fall, 0 to 1.
    """

    name: Literal["fine_pruning"] = "fine_pruning"
    drop: float = Field(default=0.2, ge=0, le=1)
    training: Training = Training(epochs=20, batch=32, lr=0.005, augment="crop")

    def mend(self, student: Normalized, view: DefenderView) -> None:
        if len(members(student)) > 1:
            raise ForeshotError(
                f"defence {self.name}: expected a student of one network, found an ensemble"
            )
        dormant, weight = self.dormant(student, view), classifier(student)
        kept = torch.ones_like(weight)
        kept[:, dormant.to(weight.device)] = 0
        with torch.no_grad():
            weight *= kept
        handle = weight.register_hook(lambda gradient: gradient * kept)  # what is zero stays zero
        self.tune(self.distiller(student, view), view)
        handle.remove()

    def dormant(self, student: Normalized, view: DefenderView) -> Tensor:
        """The features that can be spared, int64 (d,), the least active first."""
        images = there(view.clean).images
        reading = read(student, iter(images.split(BATCH)), view.compute)
        right = logits(view.teacher, images, view.compute).argmax(1)
        order = reading.features.mean(0).argsort()
        weight, left, agreed = classifier(student).T.cpu().detach(), reading.logits.clone(), []
        for feature in order.tolist():  # what a feature that is cut off gives to the logits, goes
            left -= reading.features[:, feature, None] * weight[feature]
            agreed.append((left.argmax(1) == right).double().mean())
        agreed = torch.stack(agreed)
        floor = (reading.said == right).double().mean() - self.drop
        spared = (agreed >= floor).cumprod(0).sum()
        return order[: int(spared)]


def classifier(network: nn.Module) -> nn.Parameter:
    """The weights of the last linear layer; those beneath, where they are computed of others."""
    layer = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    return next(p for p in layer.parameters() if p.dim() == 2)
