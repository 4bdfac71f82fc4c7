"""SimKD's student: its own body under the classifier of its teacher."""

from typing import Literal

import torch
from torch import Tensor, nn

from foreshot.errors import ForeshotError
from foreshot.models.base import Architecture, Normalized, active, kaiming
from foreshot.models.plain import PlainArchitecture
from foreshot.models.resnet import ResNet
from foreshot.taps import Taps


class ReusedHead(Architecture):
    """A body, a projector and the teacher's own classifier (Chen et al., arXiv 2203.14001).

    The maps of the body's last stage are projected, by convolutions of 1 x 1, 3 x 3 and 1 x 1, on
    the channels that the teacher's classifier takes, and averaged. The classifier is the teacher's
    and frozen; body and projector learn by the loss `simkd` between the student's
    ``network.projector`` and what the teacher averages in front of its ``fc``: the last stage of a
    residual network or VGG, ``relu`` of a wide one, ``head`` of the mobile ones.

    Args:
        body: the student's architecture; its own classifier is left out.
        head: the teacher's architecture.
    """

    name: Literal["reused_head"] = "reused_head"
    body: PlainArchitecture = ResNet(depth=8)
    head: PlainArchitecture = ResNet(depth=20)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        return self.body.normalisation()

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        with torch.device("meta"):  # to read the widths off
            classifier = getattr(self.head.build(shape, classes), "fc", None)
            own = self.body.build(shape, classes).eval()
            maps = Taps(own, [_last_stage(own)], "student")
            own(torch.zeros(1, *shape))
            (feature,) = maps.collect().values()
        if feature.dim() != 4:
            raise ForeshotError(
                f"model reused_head: expected a body of maps (N, C, H, W), found "
                f"{tuple(feature.shape)} from {self.body.name}"
            )
        if not isinstance(classifier, nn.Linear):
            raise ForeshotError("model reused_head: expected a head whose classifier is named fc")
        return ReusedHeadNetwork(
            self.body.build(shape, classes), feature.shape[1], classifier.in_features, classes
        )

    def adopt(self, student: Normalized, teacher: nn.Module) -> None:
        network = getattr(teacher, "network", teacher)
        own, theirs = student.network.get_submodule("fc"), getattr(network, "fc", None)
        assert isinstance(own, nn.Linear)
        if not isinstance(theirs, nn.Linear) or theirs.weight.shape != own.weight.shape:
            found = type(network).__name__ if theirs is None else f"fc {theirs}"
            raise ForeshotError(
                f"model reused_head: expected a teacher of the architecture head, with fc {own}, "
                f"found {found}"
            )
        own.load_state_dict(theirs.state_dict())


class ReusedHeadNetwork(nn.Module):
    """A body whose last maps are projected for a frozen classifier."""

    def __init__(self, body: nn.Module, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.body.fc = nn.Identity()
        self.projector = nn.Sequential(
            *active(channels, width // 2, 1),
            *active(width // 2, width // 2, 3),
            *active(width // 2, width, 1),
        )
        kaiming(self.projector)
        self.fc = nn.Linear(width, classes).requires_grad_(False)
        self._maps = Taps(body, [_last_stage(body)], "student")

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        (maps,) = self._maps.collect().values()
        return self.fc(self.projector(maps).mean((2, 3)))


def _last_stage(network: nn.Module) -> str:
    stages = [name for name, _ in network.named_children() if name.startswith("layer")]
    if not stages:
        raise ForeshotError("model reused_head: expected a body with stages layer1, layer2, ...")
    return max(stages)
