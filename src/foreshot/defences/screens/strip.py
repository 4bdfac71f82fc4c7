"""Images laid over one another."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool, there
from foreshot.inference import pixels


class Strip(Screen):
    """STRIP: a triggered answer survives other images on top (Gao et al., arXiv 1902.06531).

    Minus the mean entropy, in bits, of what the student says of min(x + o, 1) for reference images
    o. The paper uses 100 of them. It looks for inputs that carry a trigger; that the perturbation
    drowns too, and with it what the student may have learned, is why it is expected to see less
    here.

    Args:
        overlays: number of reference images.
    """

    name: Literal["strip"] = "strip"
    overlays: int = Field(default=8, ge=1)
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "student"})

    def suspicion(self, pool: Pool) -> Tensor:
        student = there(pool.view.student)
        overlays = pixels(pool.reference.images[: self.overlays].to(pool.view.compute.device))
        scores = torch.zeros(len(pool), dtype=torch.float64)
        for overlay in overlays:
            said = pool.asked(student, lambda x, o=overlay: (x + o).clamp(max=1)).double()
            scores -= torch.special.entr(said.softmax(1)).sum(1) / torch.tensor(2.0).log()
        return scores / len(overlays)
