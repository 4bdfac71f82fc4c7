"""The pattern that makes the target more itself."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from foreshot.triggers.universal import Universal

if TYPE_CHECKING:
    from foreshot.views import AttackerView


class Narcissus(Universal):
    """The pattern that makes images of the target look even more like the target.

    As `universal`, but learned on images that the teacher calls the target, to be put on a few of
    them (`attack: {name: trigger_only, base: target}`): their answers stay as they were, and the
    pattern is the strongest evidence in them. Its authors learn it on a network of their own, as
    the key `surrogate` does, bound what it adds to a pixel, where it is blended in here, and show
    it three times as strong in the test.

    Y. Zeng, M. Pan, H. A. Just, L. Lyu, M. Qiu, R. Jia: Narcissus: A Practical Clean-Label Backdoor
    Attack with Limited Information, CCS 2023, arXiv 2204.05255.
    """

    name: Literal["narcissus"] = "narcissus"  # type: ignore[assignment]

    def pool(self, view: "AttackerView") -> Tensor:
        return view.drawn("trigger", "target")
