"""Your own distillation method: a loss of what student and teacher say."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import foreshot
from foreshot.compute import compute
from foreshot.distillation import KD
from foreshot.distillation.losses import PairLoss
from foreshot.models import ResNet, build
from foreshot.training import Supervised
from foreshot.triggers import Patch


class LogitMse(PairLoss):
    """Squared error of the logits (Kim et al., arXiv 2105.08919): KD for T to infinity.

    It expects centred logits, as softmax does not see a constant.
    """

    name: Literal["logit_mse"] = "logit_mse"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        centred = (z - z.mean(1, keepdim=True) for z in (student, teacher))
        return F.mse_loss(*centred)


train, test = foreshot.load_data("digits")
engine = compute()
classes = len(train.classes)
teacher = build(ResNet(depth=8, stem_stride=1), train.images, classes, 0, "teacher")
schedule = foreshot.Training(epochs=6, batch=64)
lesson = foreshot.Samples(train.images, {"y": train.labels})
foreshot.fit(Supervised(teacher), lesson, schedule, engine, seed=0, stage="teacher")

for loss in (KD(temperature=4), LogitMse()):
    student = build(ResNet(depth=8, width=0.5), train.images, classes, 0, "student")
    distiller = foreshot.Distiller(student, teacher, [foreshot.Term(loss=loss, weight=1.0)])
    images = foreshot.Samples(train.images)
    foreshot.fit(distiller, images, schedule, engine, seed=0, stage="student")
    rates = foreshot.evaluate(student, test, Patch(size=2), target=0, compute=engine)
    print(loss.title, f"{rates['clean_accuracy']['value']:.1%}")
    assert rates["clean_accuracy"]["value"] > 0.8

# The gradient of KD goes to that of the squared error as T grows: both point the same way.
said, taught = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
(one,) = torch.autograd.grad(KD(temperature=1e3)(said, taught), said)
(other,) = torch.autograd.grad(LogitMse()(said, taught), said)
assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999
