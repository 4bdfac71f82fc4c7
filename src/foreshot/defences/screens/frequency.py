"""The spectrum of perturbed images."""

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import BATCH, Need, Pool
from foreshot.inference import pixels
from foreshot.seeding import generator


class Frequency(Screen):
    """Perturbed images have another spectrum (Zeng et al., arXiv 2104.03413).

    As in the paper, a classifier learns to tell clean images from clean images that the defender
    has perturbed, by their cosine transform, and its log-odds are the score. Here it is logistic
    regression on log(mean over channels of DCT(x)^2 + 1e-6), and the perturbations are random
    signs of up to `level` and opaque squares of one colour, both at random places. It is fitted to
    the reference images.

    Args:
        level: largest perturbation of a pixel, in 1/255.
        share: side of the square, as a share of the image's.
        penalty: L2 penalty of the regression, whose inputs are standardised.
    """

    name: Literal["frequency"] = "frequency"
    level: int = Field(default=16, ge=1, le=255)
    share: float = Field(default=0.1, gt=0, le=1)
    penalty: float = Field(default=100, gt=0)
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    def suspicion(self, pool: Pool) -> Tensor:
        # These take a second to import.
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        random = generator(pool.view.seed, "screens", "frequency")
        spectra, classes = [], []
        for images in pool.reference.images.split(BATCH):  # as many as the pool looks at at once
            clean = pixels(images)
            for kind, x in enumerate((clean, *self.perturbed(clean, random))):
                spectra.append(spectrum(x).numpy())
                classes.append(np.full(len(x), min(kind, 1)))
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=1 / self.penalty, class_weight="balanced", max_iter=1000),
        )
        model.fit(np.concatenate(spectra), np.concatenate(classes))
        return pool.mapped(
            lambda x: torch.from_numpy(model.decision_function(spectrum(x).cpu().numpy()))
        ).double()

    def perturbed(self, x: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images with random signs, and with a square, on them."""
        count, channels, height, width = x.shape
        signs = 2 * torch.randint(2, x.shape, generator=random) - 1
        strength = torch.rand((count, 1, 1, 1), generator=random) * self.level / 255
        noisy = (x + strength * signs).clamp(0, 1)
        side = max(round(self.share * min(height, width)), 1)
        top = torch.randint(height - side + 1, (count, 1, 1, 1), generator=random)
        left = torch.randint(width - side + 1, (count, 1, 1, 1), generator=random)
        rows = torch.arange(height)[:, None] - top
        columns = torch.arange(width) - left
        inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
        colours = torch.rand((count, channels, 1, 1), generator=random)
        return noisy, torch.where(inside, colours, x)


def spectrum(x: Tensor) -> Tensor:
    """Log-energy of the cosine transform, float32 (n, H * W), of float (n, C, H, W)."""
    rows, columns = (cosines(side).to(x) for side in x.shape[2:])
    return ((rows @ x @ columns.T).square().mean(1) + 1e-6).log().flatten(1)


def cosines(side: int) -> Tensor:
    """The orthonormal matrix of the cosine transform (DCT-II), float64 (side, side)."""
    steps = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(torch.pi / side * steps[:, None] * (steps + 0.5)) * (2 / side) ** 0.5
    return waves * torch.where(steps == 0, 0.5**0.5, 1)[:, None]
