"""What screens look at: the transfer set and the defender's clean images, side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from foreshot.compute import Compute
from foreshot.data.base import ImageSet
from foreshot.errors import ForeshotError
from foreshot.inference import evaluating, pixels
from foreshot.progress import Event
from foreshot.seeding import generator
from foreshot.views import DefenderView

BATCH = 128
"""Images that a network is asked about at a time: more of them leave a processor's cache."""

Need = Literal["clean", "gradient", "labels", "student", "second"]
"""What a screen may need beside the transfer set and the teacher."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a network makes of images.

    Args:
        features: the inputs of its last linear layer, float32 (N, D).
        logits: float32 (N, K).
    """

    features: Tensor
    logits: Tensor

    @cached_property
    def said(self) -> Tensor:
        """The network's answers, int64 (N,)."""
        return self.logits.argmax(1)


class Pool:
    """The transfer set, followed by one half of the clean set: all are scored, and scored alike.

    The clean images in it, the *calibration* half, tell which scores clean images get. As no
    screen knows which images these are, they and the clean images of the transfer set are
    exchangeable, even where an image's score depends on all the others: this is what makes
    thresholds set on them hold (Marandon et al., arXiv 2208.06685). So a student that is to be
    looked at has to have learned from these images as from the transfer set: what a network has
    seen in training looks otherwise to it. For the same reason the other half, the *reference*, is
    what a screen may fit itself to, and is not scored.

    Args:
        view: what the defender knows.

    Raises:
        ForeshotError: the clean set cannot be halved, or its images have another shape.
    """

    def __init__(self, view: DefenderView) -> None:
        self.view = view
        self.calibration: ImageSet | None = None
        self._reference: ImageSet | None = None
        if view.clean is None:
            return
        if len(view.clean) < 2 or view.clean.shape != view.transfer.shape:
            raise ForeshotError(
                f"clean set: expected two images or more of shape {view.transfer.shape}, "
                f"found {len(view.clean)} of shape {view.clean.shape}"
            )
        self._reference, self.calibration = halved(view.clean, view.seed)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def _parts(self) -> list[ImageSet]:
        parts = [self.view.transfer, self.calibration]
        return [part for part in parts if part is not None]

    @property
    def lacks(self) -> frozenset[Need]:
        """What no screen can have here."""
        missing: dict[Need, bool] = {
            "clean": self.calibration is None,
            "gradient": not self._differentiable,
            "labels": any(part.labels is None for part in self._parts),
            "student": self.view.student is None,
            "second": self.view.second is None,
        }
        return frozenset(need for need, lacking in missing.items() if lacking)

    @cached_property
    def _differentiable(self) -> bool:
        """Whether the teacher's answers have a gradient in the image."""
        with torch.inference_mode(False), torch.enable_grad(), evaluating(self.view.teacher):
            x = pixels(self.view.transfer.images[:1].to(self.view.compute.device)).requires_grad_()
            return self.view.teacher(x.clone()).requires_grad

    @property
    def labels(self) -> Tensor:
        """The labels that the images came with, int64 (N,)."""
        return torch.cat([part.labels for part in self._parts if part.labels is not None])

    @property
    def reference(self) -> ImageSet:
        """The clean images that are not scored."""
        return there(self._reference)

    @cached_property
    def teacher(self) -> Reading:
        return read(self.view.teacher, self.images(), self.view.compute)

    @cached_property
    def student(self) -> Reading:
        return read(there(self.view.student), self.images(), self.view.compute)

    @cached_property
    def teacher_on_reference(self) -> Reading:
        return read(self.view.teacher, self._reference_batches(), self.view.compute)

    @cached_property
    def student_on_reference(self) -> Reading:
        return read(there(self.view.student), self._reference_batches(), self.view.compute)

    def images(self) -> Iterator[Tensor]:
        """The images, uint8 (n, C, H, W) at a time: the set may be larger than memory."""
        done = 0
        for part in self._parts:
            for batch in part.images.split(BATCH):
                yield batch
                done += len(batch)
                self.view.listener(Event("screens", "advance", done, len(self)))

    def picked(self, indices: Tensor) -> Tensor:
        """Some of the images, uint8 (k, C, H, W), by their places in the pool, int64 (k,)."""
        found = torch.empty((len(indices), *self.view.transfer.shape), dtype=torch.uint8)
        start = 0
        for part in self._parts:
            mine = (indices >= start) & (indices < start + len(part))
            found[mine] = part.images[indices[mine] - start]
            start += len(part)
        return found

    def _reference_batches(self) -> Iterator[Tensor]:
        yield from self.reference.images.split(BATCH)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """What becomes of all images, of their float (n, C, H, W) on the device, joined."""
        device = self.view.compute.device
        with torch.no_grad():
            return torch.cat([change(pixels(x.to(device))).cpu() for x in self.images()])

    def asked(self, network: nn.Module, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """What a network says of the images, changed; float32 logits (N, K)."""
        with evaluating(network):
            return finite(self.mapped(lambda x: network(change(x)).float()))


def halved(clean: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """The reference and the calibration half of a defender's clean images, by his seed."""
    order = torch.randperm(len(clean), generator=generator(seed, "screens", "clean"))
    half = len(order) // 2
    return clean.select(order[:half]), clean.select(order[half:])


@torch.no_grad()
def read(network: nn.Module, batches: Iterator[Tensor], compute: Compute) -> Reading:
    """Features and logits in eval mode and float32, on the CPU.

    Args:
        network: float (n, C, H, W) in [0, 1] -> logits (n, K).
        batches: uint8 (n, C, H, W) each.
        compute: where to run.

    Raises:
        ForeshotError: the network has no linear layer, did not run it once a batch, or answers with
            what is no number.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ForeshotError(
            f"screens: expected a network with a linear layer to take features from, "
            f"found {type(network).__name__} without one"
        )
    features: list[Tensor] = []
    logits: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].flatten(1).float().cpu())
    )
    try:
        with evaluating(network):
            for images in batches:
                logits.append(network(pixels(images.to(compute.device))).float().cpu())
    finally:
        handle.remove()
    joined = Reading(torch.cat(features), torch.cat(logits))
    if len(joined.features) != len(joined.logits):
        raise ForeshotError(
            f"screens: expected the last linear layer to run once for each image, "
            f"found {len(joined.features)} inputs for {len(joined.logits)} images"
        )
    return Reading(joined.features, finite(joined.logits))


def finite(logits: Tensor) -> Tensor:
    """Logits as they are; nothing can be concluded from infinite ones, or from none at all."""
    if not logits.isfinite().all():
        raise ForeshotError("screens: expected finite logits of each network, found others")
    return logits


T = TypeVar("T")


def there(thing: T | None) -> T:
    """What the view has, if the screen declares that it needs it."""
    assert thing is not None, "a screen reads what it does not declare in `needs`"
    return thing
