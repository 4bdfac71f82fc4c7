"""A network for perturbations."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from foreshot.adversarial import detector
from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool


class Detector(Screen):
    """A network learns to tell perturbed images from clean ones (Gong et al., arXiv 1704.04960).

    The perturbed ones are adversarial examples of the teacher that the defender makes of the
    reference images, and some that are noise; the score is the log-odds (`adversarial.detector`).
    Poison that is perturbed all over is known by that, whatever it is there for, also where the
    teacher's answer is the right one and stays so under changes. Detectors like it were crafted
    past by who knew them (Carlini and Wagner, arXiv 1705.07263).

    Args:
        level: largest perturbation of a pixel that the network is shown, in 1/255.
        epochs: passes over the examples.
    """

    name: Literal["detector"] = "detector"
    level: int = Field(default=16, ge=4, le=255)
    epochs: int = Field(default=12, ge=1)
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "gradient"})

    def suspicion(self, pool: Pool) -> Tensor:
        view = pool.view
        network = detector(
            view.teacher,
            pool.reference.images,
            view.compute,
            seed=view.seed,
            stage=self.name,
            level=self.level,
            epochs=self.epochs,
        )
        return pool.asked(network).double()
