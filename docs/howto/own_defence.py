"""Your own defence: a screen is a score for each image; thresholds and p-values are there."""

from typing import Literal

import torch
from torch import Tensor

import foreshot
from foreshot.attacks import Noise
from foreshot.compute import compute
from foreshot.defences import Screen, judge
from foreshot.defences.pool import Pool
from foreshot.defences.scoring import quality
from foreshot.models import ResNet, build
from foreshot.training import Supervised
from foreshot.triggers import Patch
from foreshot.views import DefenderView


class Background(Screen):
    """What you know of your data: these scans lie on black, so dark greys are out of place.

    The share of an image's pixels that are neither black nor brighter than a quarter.
    """

    name: Literal["background"] = "background"

    def suspicion(self, pool: Pool) -> Tensor:
        def dark(x: Tensor) -> Tensor:
            return ((x > 0) & (x <= 0.25)).float().mean((1, 2, 3))

        return pool.mapped(dark).double()


train, test = foreshot.load_data("digits")
engine = compute()
teacher = build(ResNet(depth=8, stem_stride=1), train.images, len(train.classes), 0, "teacher")
lesson = foreshot.Samples(train.images, {"y": train.labels})
schedule = foreshot.Training(epochs=6, batch=64)
foreshot.fit(Supervised(teacher), lesson, schedule, engine, seed=0, stage="teacher")

# The defender has 400 clean images, drawn like the rest; the attacker poisons what is left.
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
clean, transfer = train.select(order[:400]), train.select(order[400:])
attack, trigger = Noise(rate=0.1, epsilon=48), Patch(size=2)
poison = foreshot.craft(attack, transfer.images, teacher, trigger, target=0, seed=0, compute=engine)
arrived = poison.apply(transfer)

# All that a defence knows; neither the trigger nor the poisoned indices are among it.
view = DefenderView(arrived, teacher, student=None, clean=clean, seed=0, compute=engine)
verdict = judge(Background(), view)
found = quality(verdict, poison, target=0)  # the experimenter's, who knows the poison
print(f"AUROC {found['auroc']:.3f}, removed {found['poison_removed']['value']:.0%} of the poison")
print(f"and {found['clean_removed']['value']:.1%} of the rest")
assert found["auroc"] > 0.9
assert found["poison_removed"]["value"] > 0.8
