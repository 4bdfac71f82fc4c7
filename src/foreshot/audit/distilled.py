"""A student for the screens that look at one: distilled on the set, looked at, and thrown away."""

from pathlib import Path

import torch
from torch import nn

from foreshot.distillation import KD, Distiller, Term
from foreshot.inference import logits, pixels, place
from foreshot.models import ResNet, build
from foreshot.stages import EXAMPLE, TRAINING
from foreshot.training import Samples, Training, fit
from foreshot.views import DefenderView

STUDENT = "student"
SOURCES = ("audit/distilled.py", "distillation", *TRAINING)
SCHEDULE = Training(epochs=8)


def blank(view: DefenderView) -> nn.Module:
    """A small network that has learned nothing yet, the same for the same set and seed."""
    side = min(view.transfer.shape[1:])
    architecture = ResNet(depth=8, width=0.75, stem_stride=2 if side >= 16 else 1)
    images = view.transfer.images
    classes = logits(view.teacher, images[:1], view.compute).shape[1]
    model = build(architecture, images, classes, view.seed, STUDENT)
    return place(model, view.compute)


def teach(student: nn.Module, view: DefenderView, checkpoint: Path | None) -> None:
    """Teaches it what the teacher says of all images that are scored.

    It sees the clean images among them as it sees the set: what a network has learned from looks
    otherwise to it, and scores of the one would not compare with scores of the other.

    Args:
        student: from `blank`; changed in place.
        view: the set, the teacher and the clean images.
        checkpoint: a file for the state after each epoch, from which training goes on.
    """
    images = view.pool.picked(torch.arange(len(view.pool)))
    distiller = Distiller(
        student,
        view.teacher,
        [Term(loss=KD(temperature=4))],
        example=pixels(images[:EXAMPLE].to(view.compute.device)),
        samples=len(images),
        seed=view.seed,
    )
    samples = Samples(images, {"teacher_logits": view.pool.teacher.logits})
    fit(
        distiller,
        samples,
        SCHEDULE,
        view.compute,
        seed=view.seed,
        stage=STUDENT,
        listener=view.listener,
        checkpoint=checkpoint,
    )
