"""Your own networks: any module that maps images in [0, 1] to logits will do."""

import torch
from torch import Tensor, nn

import foreshot
from foreshot.audit.data import audit
from foreshot.compute import compute
from foreshot.distillation import KD
from foreshot.training import Supervised
from foreshot.triggers import Patch


class Mixer(nn.Module):
    """A one-block MLP-Mixer (Tolstikhin et al., arXiv 2105.01601) for 8 x 8 images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)  # 16 patches
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2)
        x = (x + self.tokens(x)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


train, test = foreshot.load_data("digits")
engine = compute()
torch.manual_seed(0)
teacher, student = Mixer(64), Mixer(16)
schedule = foreshot.Training(epochs=15, batch=64, lr=0.05)

lesson = foreshot.Samples(train.images, {"y": train.labels})
foreshot.fit(Supervised(teacher), lesson, schedule, engine, seed=0, stage="teacher")

distiller = foreshot.Distiller(student, teacher, [foreshot.Term(loss=KD(temperature=4))])
answers = foreshot.Samples(train.images)
foreshot.fit(distiller, answers, schedule, engine, seed=0, stage="student")

for name, network in (("teacher", teacher), ("student", student)):
    rates = foreshot.evaluate(network, test, Patch(size=2), target=0, compute=engine)
    print(name, f"{rates['clean_accuracy']['value']:.1%}")
    assert rates["clean_accuracy"]["value"] > 0.8

# The training images are clean, and so are these; the verdict need not wait for a student.
found = audit(train, teacher, clean=test, compute=engine)
print("suspicious" if found.suspicious else "nothing found", f"p = {found.set_p:.3f}")
