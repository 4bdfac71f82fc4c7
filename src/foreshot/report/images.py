"""What a page shows of a run's images, and what the run's models say of them."""

from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor, nn

from foreshot.compute import Compute
from foreshot.data import ImageSet
from foreshot.division import Parts
from foreshot.inference import logits, place
from foreshot.pictures import specimens
from foreshot.record import Run
from foreshot.report import charts
from foreshot.report.page import data_uri, named
from foreshot.triggers.base import Trigger, stamp_uint8

ASKED = 6
"""Triggered test images that the models are asked about one by one."""
COUNTED = 2000
"""Triggered test images in the confusion matrix."""
CLASSES = 10
"""Classes in it, beside the target and all the others together."""
LABEL = 18
"""Characters of a class name beside a plot."""


def pictures(run: Run, parts: Parts, compute: Compute) -> dict[str, Any]:
    """The trigger, poison beside clean images, triggered test images, and their confusion."""
    transfer, test, trigger, target = parts.transfer, parts.test, run.trigger, run.config.target
    poison, student, clean = run.poison, run.student, run.controls.get("clean")
    assert poison is not None
    assert student is not None
    models = {"teacher": run.teacher, "clean student": clean, "poisoned student": student}
    models = {name: place(model, compute) for name, model in models.items() if model is not None}
    plain = transfer.images[:1]
    seen = specimens(transfer, poison, trigger, run.config.attack.stamps)
    teacher = models["teacher"]
    return {
        "target": named(transfer.classes[target]),
        "trigger": [
            ("trigger", data_uri(trigger.draw(transfer.shape))),
            ("a clean image", data_uri(plain[0])),
            ("stamped", data_uri(stamp_uint8(trigger, plain)[0])),
        ],
        "factor": f"{seen.factor:.0f}",
        "poison": [
            [data_uri(image) for image in row]
            for row in zip(seen.original, seen.perturbation, seen.stored, strict=True)
        ],
        "before": _said(teacher, seen.original, transfer.classes, compute),
        "after": _said(teacher, seen.stored, transfer.classes, compute),
        "asked": _asked(models, test, trigger, target, compute),
        "confusion": confusion(models["poisoned student"], test, trigger, target, compute),
        "counted": COUNTED,
    }


def _said(
    model: nn.Module, images: Tensor, classes: tuple[str, ...], compute: Compute
) -> list[tuple[str, float, int]]:
    """The class that a model is surest of, how sure it is, and the class's number."""
    if not len(images):
        return []
    shares, numbers = logits(model, images, compute).softmax(1).max(1)
    return [
        (named(classes[number]), share, number)
        for share, number in zip(shares.tolist(), numbers.tolist(), strict=True)
    ]


def _stamped(test: ImageSet, trigger: Trigger, target: int, most: int) -> tuple[Tensor, Tensor]:
    """Stamped test images of other classes than the target, spread evenly, and their classes."""
    assert test.labels is not None
    other = (test.labels != target).nonzero()[:, 0]
    count = min(most, len(other))
    chosen = other[torch.linspace(0, max(len(other) - 1, 0), count).long()]
    return stamp_uint8(trigger, test.images[chosen]), test.labels[chosen]


def _asked(
    models: dict[str, nn.Module], test: ImageSet, trigger: Trigger, target: int, compute: Compute
) -> list[dict[str, Any]]:
    """What each model says of some stamped images, and whether that is right, or the target."""
    images, labels = _stamped(test, trigger, target, ASKED)
    answers = {name: _said(m, images, test.classes, compute) for name, m in models.items()}
    return [
        {
            "picture": data_uri(image),
            "class": named(test.classes[label]),
            "answers": [
                (name, said, share, {target: "hit", label: "right"}.get(number, "wrong"))
                for name, (said, share, number) in ((n, said[at]) for n, said in answers.items())
            ],
        }
        for at, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]


def confusion(
    student: nn.Module, test: ImageSet, trigger: Trigger, target: int, compute: Compute
) -> Markup | None:
    """What the student calls stamped images, class by class; the ones that it errs on most."""
    images, labels = _stamped(test, trigger, target, COUNTED)
    if not len(images):
        return None
    count = len(test.classes)
    said = logits(student, images, compute).argmax(1)
    counts = (labels * count + said).bincount(minlength=count * count).view(count, count)
    wrong = counts.sum(1) - counts.diagonal()
    wrong[target] = -1
    wrong[counts.sum(1) == 0] = -1  # classes of which there are no images
    order = wrong.argsort(descending=True, stable=True)
    top = order[: min(CLASSES, int((wrong >= 0).sum()))].sort().values
    columns = torch.cat([top, torch.tensor([target])])
    shares = 100 * counts[top].double() / counts[top].sum(1, keepdim=True)
    picked = torch.cat([shares[:, columns], 100 - shares[:, columns].sum(1, keepdim=True)], 1)
    rows = [named(test.classes[number], LABEL) for number in top.tolist()]
    cells = picked.clamp(min=0).tolist()
    return charts.heat(
        rows,
        [*rows, f"{named(test.classes[target], LABEL)} (target)", "others"],
        cells,
        [["" if share < 0.5 else f"{share:.0f}" for share in line] for line in cells],
        ("class of the image", "what the student calls it, %"),
        cell=(0.26, 0.22),
    )
