"""What one chunk of images is crafted from, and the box that what becomes of them stays in."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from foreshot.inference import pixels
from foreshot.levels import to_uint8
from foreshot.seeding import generator
from foreshot.triggers.base import stamp_uint8, unperturbed
from foreshot.views import AttackerView

if TYPE_CHECKING:
    from foreshot.attacks.base import Attack


@dataclass(frozen=True, eq=False)
class Chunk:
    """Images that are crafted together.

    Args:
        indices: int64 (n,), global: randomness is keyed by them.
        images: uint8 (n, C, H, W), as they are in the transfer set.
        effort: 0 at first, one more at each retry.
    """

    indices: Tensor
    images: Tensor
    effort: int


@dataclass(frozen=True, eq=False)
class Problem:
    """One chunk to perturb: find x in [low, high] for which the teacher says the target.

    Args:
        attack: whose epsilon and trigger placement hold.
        view: what the attacker knows; in a worker without the images and the teacher's answers.
        teacher: frozen; float (n, C, H, W) in [0, 1] -> logits.
        plain: uint8 (n, C, H, W), the images as they are in the transfer set.
        beside: uint8 (m, C, H, W), the further images that the attack asks for.
        start: float (n, C, H, W), the images without any perturbation.
        low, high: bounds of x, whole 8-bit levels / 255: epsilon, [0, 1], fixed trigger pixels.
        indices: int64 (n,), global: randomness is keyed by them.
        effort: 0 at first, one more at each retry.
    """

    attack: "Attack"
    view: AttackerView
    teacher: nn.Module
    plain: Tensor
    beside: Tensor
    start: Tensor
    low: Tensor
    high: Tensor
    indices: Tensor
    effort: int

    @classmethod
    def pose(
        cls,
        chunk: Chunk,
        attack: "Attack",
        view: AttackerView,
        teacher: nn.Module,
        beside: Tensor,
    ) -> Self:
        """The box around the stamped images, or the plain ones if the trigger comes after."""
        plain = chunk.images
        early = attack.stamps and attack.trigger != "after"
        start = stamp_uint8(view.trigger, plain) if early else plain
        centre = start.short()
        low = (centre - attack.epsilon).clamp(min=0)
        high = (centre + attack.epsilon).clamp(max=255)
        if early and attack.trigger == "inside":
            fixed = view.trigger.opaque((plain.shape[1], plain.shape[2], plain.shape[3]))
            low, high = torch.where(fixed, centre, low), torch.where(fixed, centre, high)
        start, low, high = (pixels(levels.to(view.compute.device)) for levels in (start, low, high))
        return cls(
            attack, view, teacher, plain, beside, start, low, high, chunk.indices, chunk.effort
        )

    def store(self, x: Tensor) -> Tensor:
        """The 8-bit images that are put into the transfer set, never further off than epsilon."""
        images, attack = to_uint8(x.detach().float()).cpu(), self.attack
        if attack.stamps and attack.trigger == "after":
            images = stamp_uint8(self.view.trigger, images)
        home = unperturbed(self.view.trigger, self.plain, images, attack.stamps).short()
        held = torch.clamp(images.short(), home - attack.epsilon, home + attack.epsilon)
        return held.to(torch.uint8)

    def logits(self, x: Tensor) -> Tensor:
        """What the teacher says of x, float32, in the precision of crafting."""
        with self.view.compute.autocast():
            return self.teacher(x).float()

    def noise(self) -> Tensor:
        """Uniform in [0, 1), shaped as x; each image's depends on its global index alone."""
        shape = tuple(self.start.shape[1:])
        keys = ("poison", "noise", self.effort)
        rows = [
            torch.rand(shape, generator=generator(self.view.seed, *keys, index))
            for index in self.indices.tolist()
        ]
        return torch.stack(rows).to(self.start.device)

    def hold(self, x: Tensor) -> Tensor:
        """X moved to the nearest point of the box."""
        return x.maximum(self.low).minimum(self.high)
