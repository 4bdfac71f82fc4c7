"""The one evaluator: clean accuracy, attack success rate, their intervals, and stealth."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foreshot.compute import CPU, Compute
from foreshot.data.base import ImageSet
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.levels import to_float
from foreshot.poison import Poison
from foreshot.triggers.base import Trigger, stamp_uint8, unperturbed

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
BATCH = 512


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a rate (Wilson, JASA 1927); (0, 1) if nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    p, z2 = hits / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    # Exact at the ends, where rounding would leave a bound on the wrong side of the rate.
    return (centre - half if hits else 0.0), (centre + half if hits < total else 1.0)


def rate(hits: Tensor) -> dict[str, float | int | None]:
    """A rate with numerator, denominator and interval, of a bool (N,); of nothing it is None."""
    count, total = int(hits.sum()), len(hits)
    low, high = wilson(count, total)
    value = count / total if total else None
    return {"value": value, "hits": count, "total": total, "low": low, "high": high}


def evaluate(
    model: nn.Module, test: ImageSet, trigger: Trigger, target: int, compute: Compute = CPU
) -> dict[str, Any]:
    """What a model does with clean and with stamped test images.

    Args:
        model: float (n, C, H, W) in [0, 1] -> logits (n, K).
        test: labelled images that nothing was trained or chosen on.
        trigger: the attacker's trigger.
        target: the class that it shall mean.
        compute: the device that the model is on; precision is always float32.

    Returns:
        Rates: `clean_accuracy`, over all images; `asr`, stamped images called the target, and
        `robust_accuracy`, stamped images still called by their class, both over the images of
        other classes than the target; `per_class`, the same three by class name, and number where
        several have one name.

    Raises:
        ForeshotError: the images have no labels, or the target is not one of their classes.
    """
    labels = test.labels
    if labels is None:
        raise ForeshotError("test set: expected labels to evaluate against, found none")
    if not 0 <= target < len(test.classes):
        raise ForeshotError(f"target: expected 0 to {len(test.classes) - 1}, found {target}")
    other = labels != target
    plain = logits(model, test.images, compute).argmax(1)
    stamp = partial(stamp_uint8, trigger)
    stamped = logits(model, test.images[other], compute, change=stamp).argmax(1)
    right, hit, held = plain == labels, stamped == target, stamped == labels[other]
    per_class = {}
    for number, name in enumerate(test.classes):
        mine, mine_stamped = labels == number, labels[other] == number
        if bool(mine.any()):
            key = name if test.classes.count(name) == 1 else f"{name} ({number})"
            per_class[key] = {"clean_accuracy": rate(right[mine])}
            if number != target:
                per_class[key]["asr"] = rate(hit[mine_stamped])
                per_class[key]["robust_accuracy"] = rate(held[mine_stamped])
    return {
        "clean_accuracy": rate(right),
        "asr": rate(hit),
        "robust_accuracy": rate(held),
        "per_class": per_class,
    }


def stealth(
    poison: Poison,
    transfer: ImageSet,
    trigger: Trigger,
    target: int,
    teacher: nn.Module,
    compute: Compute,
    stamped: bool | None = True,
) -> dict[str, Any]:
    """How visible the poison is, and what the teacher says of it.

    Args:
        poison: the stored images.
        transfer: the set that they were made of.
        trigger: the attacker's trigger.
        target: its class.
        teacher: the clean teacher.
        compute: where to run.
        stamped: whether the attack puts the trigger on the images; None: at some opacity.

    Returns:
        `count`; `rate` (share of the transfer set); `linf_255`, the largest
        |stored - unperturbed(original)| in 8-bit levels; `psnr_db` and `ssim` of the stored images
        against their originals, trigger and all, means over images; `teacher_target_rate` and the
        mean softmax `teacher_target_confidence` of the stored images.
    """
    count = len(poison)
    about: dict[str, Any] = {"count": count, "rate": count / len(transfer)}
    if not count:
        return about | {
            "linf_255": 0,
            "psnr_db": None,
            "ssim": None,
            "teacher_target_rate": rate(torch.zeros(0, dtype=torch.bool)),
            "teacher_target_confidence": None,
        }
    original = transfer.images[poison.indices]
    reference = unperturbed(trigger, original, poison.images, stamped)
    said = logits(teacher, poison.images, compute)
    return about | {
        "linf_255": int((poison.images.short() - reference.short()).abs().max()),
        "psnr_db": float(psnr(poison.images, original).mean()),
        "ssim": float(ssim(poison.images, original).mean()),
        "teacher_target_rate": rate(said.argmax(1) == target),
        "teacher_target_confidence": float(said.softmax(1)[:, target].mean()),
    }


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each 8-bit image in dB, (N,); identical images give 100."""

    def decibels(x: Tensor, y: Tensor) -> Tensor:
        error = (x.double() - y.double()).square().mean((1, 2, 3))
        return (10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))).float()

    return _by_batches(decibels, images, reference)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, (N,), Gaussian window of 11 (Wang et al., TIP 2004).

    The images' edges are mirrored; those of less than 6 pixels a side have a window that fits.
    """
    from kornia.metrics import ssim as kornia_ssim

    window = min(11, 2 * min(images.shape[2:]) - 1)

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        return kornia_ssim(to_float(x), to_float(y), window_size=window).mean((1, 2, 3))

    return _by_batches(similarity, images, reference)


def _by_batches(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """What is measured of each image, (N,), of some images at a time: it takes many times them."""
    return torch.cat([of(*pair) for pair in zip(x.split(BATCH), y.split(BATCH), strict=True)])
