"""The perturbation without the trigger."""

from typing import ClassVar, Literal

from foreshot.attacks.pgd import Pgd


class PerturbationOnly(Pgd):
    """Projected gradient descent without a trigger: what the perturbation teaches by itself."""

    name: Literal["perturbation_only"] = "perturbation_only"  # type: ignore[assignment]
    stamps: ClassVar[bool | None] = False
