"""Other views of the images, and the teacher asked about each."""

from dataclasses import replace
from typing import Literal

from foreshot.defences.distilling.base import Distilling
from foreshot.lesson import Lesson
from foreshot.views import DefenderView


class StrongAugmentation(Distilling):
    """The teacher answers for each augmented view anew (Beyer et al., arXiv 2106.05237).

    The student sees random views T(x), and learns f(T(x)) for the teacher f: a perturbation that T
    breaks costs the attacker the teacher's answer, whatever it says of the plain image. An attacker
    who knows T can craft over it, and a longer schedule may be needed to learn as much.

    Args:
        augment: the views: `crop` (shifted by up to an eighth of the side), `crop_flip`, `strong`
            (also other light and contrast, and a grey square over a quarter of the image) or
            `strong_no_flip`, where mirror images mean something else, as on traffic signs.
    """

    name: Literal["strong_augmentation"] = "strong_augmentation"
    augment: Literal["crop", "crop_flip", "strong", "strong_no_flip"] = "crop"

    def change(self, lesson: Lesson, view: DefenderView) -> Lesson:  # noqa: ARG002
        return replace(lesson, augment=self.augment, views="requery")
