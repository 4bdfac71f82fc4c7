"""The student that an attacker distils to learn what the victim's will learn."""

from torch import nn

from foreshot.attacks.folding import frozen
from foreshot.augment import STRONG
from foreshot.distillation import KD, Distiller, Term
from foreshot.models import build
from foreshot.models.base import Architecture
from foreshot.poison import Poison
from foreshot.training import Samples, Training, fit
from foreshot.views import AttackerView


def surrogate(
    view: AttackerView,
    architecture: Architecture,
    training: Training,
    poison: Poison | None = None,
    number: int = 1,
) -> nn.Module:
    """A student of the attacker's own, frozen: of a seed that no victim has.

    Args:
        view: whose labeller it learns from, by its answers alone, at a temperature of 4.
        architecture: the attacker need not know the victim's.
        training: how it is distilled; of augmented views the teacher is asked anew.
        poison: what lies in the transfer set; None leaves it clean.
        number: tells the attacker's students apart.
    """
    stage = f"surrogate student {number}"
    view = view.of_labeller()
    images, answers = view.images, view.answers()
    if poison is not None:
        images = images.index_copy(0, poison.indices, poison.images)
        answers = poison.answers(answers, view.teacher, view.compute)
    teacher = frozen(view.teacher, view.compute)
    samples = Samples(images, {"teacher_logits": answers})
    if training.augment != "none":
        samples = Samples(images, teacher=None if training.augment in STRONG else teacher)
    student = build(architecture, images, answers.shape[1], view.seed, stage)
    architecture.adopt(student, view.teacher)
    fit(
        Distiller(student, teacher, [Term(loss=KD(temperature=4))]),
        samples,
        training,
        view.compute,
        seed=view.seed,
        stage=stage,
        listener=view.listener,
    )
    return student.requires_grad_(False)
