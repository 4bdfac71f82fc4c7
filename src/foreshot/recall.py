"""What a teacher said of the views of a set that were seen before."""

import torch
from torch import Tensor, nn

from foreshot.augment import Augmentation, augment, number_of_views
from foreshot.compute import Compute
from foreshot.errors import ForeshotError
from foreshot.inference import pixels

LARGEST = 4 << 30
"""Bytes that the answers may take; of a larger set none is remembered."""
CHUNK = 128
"""Views that the teacher is asked about together. Padded, so that no answer depends on the others,
nor on whether a training was interrupted."""


class Recall:
    """A teacher's answers to the exact views of a set: crop, and mirrored or not.

    The fewer views there are, and the more epochs, the less is left to ask: with N views, the
    share of new ones in epoch e + 1 is (1 - 1 / N)^e.

    Args:
        teacher: float (n, C, H, W) in [0, 1] -> logits (n, K); frozen, in eval mode.
        images: the set, uint8 (N, C, H, W), where it is trained on.
        kind: the views.
        compute: device and precision.

    Raises:
        ForeshotError: the views are not counted, so none comes up again.
    """

    def __init__(
        self, teacher: nn.Module, images: Tensor, kind: Augmentation, compute: Compute
    ) -> None:
        self.teacher, self.images, self.compute = teacher, images, compute
        self.kind: Augmentation = kind
        channels, height, width = images.shape[1:]
        views = number_of_views(kind, (channels, height, width))
        if views is None:
            raise ForeshotError(f"augment {kind}: no view comes up again; ask the teacher itself")
        classes = self._ask(torch.zeros(1).long(), torch.zeros(1).long()).shape[1]
        size = len(images) * views * classes * 4
        self._kept = size <= LARGEST and compute.holds(size)
        slots = views if self._kept else 1
        # The system gives memory, by the page, to what is written: views that do not occur cost
        # none where the answers to one fill a page.
        self._answers = torch.empty(len(images), slots, classes, device=compute.device)
        # On the CPU, as indices and views are: the device is never waited for.
        self._known = torch.zeros(len(images), slots, dtype=torch.bool)

    def prepare(self, index: Tensor, views: Tensor) -> None:
        """Asks about what is not known yet.

        Args:
            index: of the images, int64 (n,), on the CPU, without repeats.
            views: their views, int64 (n,), on the CPU.
        """
        new = ~self._known[index, self._slots(views)]
        index, views = index[new], views[new]
        slots = self._slots(views)
        for start in range(0, len(index), CHUNK):
            asked = slice(start, start + CHUNK)
            where = index[asked].to(self.compute.device), slots[asked].to(self.compute.device)
            self._answers[where] = self._ask(index[asked], views[asked])
        self._known[index, slots] = self._kept

    def __call__(self, index: Tensor, views: Tensor) -> Tensor:
        """The answers to views that are prepared, float32 (n, K)."""
        device = self.compute.device
        return self._answers[index.to(device), self._slots(views).to(device)]

    def _slots(self, views: Tensor) -> Tensor:
        return views if self._kept else torch.zeros_like(views)

    @torch.no_grad()
    def _ask(self, index: Tensor, views: Tensor) -> Tensor:
        count = len(index)
        padded = torch.arange(CHUNK) % count
        images = self.images[index[padded].to(self.images.device)].to(self.compute.device)
        x = pixels(augment(images, self.kind, torch.Generator(), views[padded]))
        with self.compute.autocast():
            return self.teacher(x)[:count].float()
