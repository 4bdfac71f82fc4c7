"""A student for the screens that look at one: distilled on the set, and used for nothing else."""

from pathlib import Path

import torch
from torch import nn

from foreshot.distillation import KD, Distiller, Term
from foreshot.inference import place
from foreshot.models import ResNet, build
from foreshot.models.checkpoint import save_model
from foreshot.training import TRAINING, Samples, Training, fit
from foreshot.views import DefenderView

FILE = "model.safetensors"
SOURCES = ("audit/distilled.py", "distillation", *TRAINING)
STUDENT = "student"
SCHEDULE = Training(epochs=8)


def distil(view: DefenderView, folder: Path) -> None:
    """Teaches a small network what the teacher says of all images that are scored.

    It sees the clean images among them as it sees the set: what a network has learned from looks
    otherwise to it, and scores of the one would not compare with scores of the other.

    Args:
        view: the set, the teacher and the clean images.
        folder: where the student is written as `FILE`, and its state after each epoch meanwhile.
    """
    images, answers = view.pool.picked(torch.arange(len(view.pool))), view.pool.teacher.logits
    side, classes = min(images.shape[2:]), answers.shape[1]
    architecture = ResNet(depth=8, width=0.75, stem_stride=2 if side >= 16 else 1)
    student = build(architecture, images, classes, view.seed, STUDENT)
    place(student, view.compute)
    # The teacher has answered, and stays as it is: a distiller would freeze its weights.
    fit(
        Distiller(student, nn.Identity(), [Term(loss=KD(temperature=4))]),
        Samples(images, {"teacher_logits": answers}),
        SCHEDULE,
        view.compute,
        seed=view.seed,
        stage=STUDENT,
        listener=view.listener,
        checkpoint=folder / f".{FILE}",
    )
    names = tuple(map(str, range(classes)))
    save_model(folder / FILE, student, architecture, view.transfer.shape, names)
