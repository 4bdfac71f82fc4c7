"""Trigger inversion relative to a teacher: the smallest change that turns a student alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foreshot.inference import pixels
from foreshot.seeding import generator

WANTED = 0.5
"""Share of the images that a change has to turn."""
START = 9 / 255
"""Size of a change at first."""
MOMENTUM = 0.8
MEMORY = 0.7
"""How much the successes before a step weigh after it."""
WARM = 5
"""Steps before sizes begin to change: until then directions are little more than noise."""


@dataclass(frozen=True, eq=False)
class Changes:
    """One change a class, the same for all images: what is added to pixels in [0, 1].

    Args:
        classes: int64 (k,).
        patterns: float32 (k, C, H, W).
        sizes: their root mean squares, float32 (k,).
        turned: about which share of the images they turn, by the last few batches, float32 (k,).
    """

    classes: Tensor
    patterns: Tensor
    sizes: Tensor
    turned: Tensor

    def select(self, index: Tensor) -> "Changes":
        """Some of them."""
        return Changes(*(part[index] for part in self.parts))

    def put(self, index: Tensor, others: "Changes") -> "Changes":
        """Others in place of some of them."""
        pairs = zip(self.parts, others.parts, strict=True)
        return Changes(*(mine.index_copy(0, index, theirs) for mine, theirs in pairs))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Its tensors, in the order of the fields."""
        return self.classes, self.patterns, self.sizes, self.turned


def faint(classes: Tensor, shape: tuple[int, int, int], seed: int) -> Changes:
    """What a search begins with: noise, of its own for each class."""
    noises = [
        torch.randn(shape, generator=generator(seed, "inversion", c)) for c in classes.tolist()
    ]
    sizes = torch.full((len(classes),), START)
    return Changes(classes, sized(torch.stack(noises), sizes), sizes, torch.zeros_like(sizes))


def invert(
    student: nn.Module,
    teacher: nn.Module | None,
    images: Tensor,
    said: Tensor,
    start: Changes,
    *,
    steps: int,
    batch: int,
    seed: int,
    tell: Callable[[int], None] = lambda _: None,
) -> Changes:
    """For each class t the smallest change d_t after which a student says t and a teacher does not.

    Over images x that the teacher calls y(x), other than t, and with the lead m_c(z) of the logit
    of c over all others, it descends

        softplus(-m_t(student(x + d))) + softplus(-m_y(teacher(x + d))),  x + d clamped to [0, 1],

    on the sphere of the change's size. The size shrinks while more than `WANTED` of the images are
    turned, that is m_t > 0 and m_y > 0, and else grows: direction and size apart, as in the DDN
    attack (Rony et al., arXiv 1811.09600), for one change on all images as in Neural Cleanse (Wang
    et al., IEEE S&P 2019), whose mask it does without: a patch is a change of a few pixels.

    A class's change does not depend on which others are sought beside it.

    Args:
        student: float (n, C, H, W) in [0, 1] -> logits (n, K), in eval mode.
        teacher: the same; None if the student alone counts.
        images: uint8 (N, C, H, W), on the networks' device.
        said: the classes that the teacher calls them, int64 (N,).
        start: the classes, and the changes to go on from.
        steps: gradient steps.
        batch: images a step, drawn for all classes together.
        seed: of these draws.
        tell: hears of the number of steps done.
    """
    device = images.device
    classes, patterns, sizes = (
        t.to(device) for t in (start.classes[:, None], start.patterns, start.sizes)
    )
    ones, speed, turned = torch.ones_like(sizes), torch.zeros_like(patterns), WANTED * sizes.sign()
    for step in range(steps):
        random = generator(seed, "inversion", "batch", steps, step)
        index = torch.randint(len(images), (batch,), generator=random).to(device)
        x, y = pixels(images[index]), said[index]
        others = (y != classes).float()
        patterns.requires_grad_()
        loss, hit = misled(student, teacher, x, y, classes, patterns)
        (slope,) = torch.autograd.grad((others * loss).sum(), patterns)
        now = (others * hit).sum(1) / others.sum(1).clamp(min=1)
        turned = MEMORY * turned + (1 - MEMORY) * now
        speed = MOMENTUM * speed - sized(slope, ones)
        left = 1 - step / steps
        if step >= WARM:
            sizes = sizes * torch.exp((0.07 + 0.17 * left) * (WANTED - turned))
        rate = 0.04 + 0.15 * (1 - math.cos(math.pi * left))
        patterns = sized(patterns.detach() + sized(speed, rate * sizes), sizes)
        tell(step + 1)
    return Changes(start.classes, patterns.cpu(), sizes.cpu(), turned.cpu())


def misled(
    student: nn.Module,
    teacher: nn.Module | None,
    x: Tensor,
    said: Tensor,
    classes: Tensor,
    patterns: Tensor,
) -> tuple[Tensor, Tensor]:
    """How far changes are from turning a student alone, as `invert` descends it, and where they do.

    Args:
        student: float (n, C, H, W) in [0, 1] -> logits (n, K), in eval mode.
        teacher: the same, which is to keep its answers; None if the student alone counts.
        x: images, float (n, C, H, W) in [0, 1].
        said: what the teacher calls them, int64 (n,).
        classes: what a student shall call them with each change, int64 (k, 1).
        patterns: the changes, float (k, C, H, W).

    Returns:
        The loss, float (k, n), and whether an image is turned, bool (k, n). Images that are called
        the class already are among them.
    """
    changed = (x + patterns[:, None]).clamp(0, 1).flatten(0, 1)
    changed = changed.contiguous(memory_format=torch.channels_last)
    shape = len(patterns), len(x)
    ahead = lead(student(changed).float().unflatten(0, shape), classes)
    loss, hit = F.softplus(-ahead), ahead > 0
    if teacher is not None:
        kept = lead(teacher(changed).float().unflatten(0, shape), said)
        loss, hit = loss + F.softplus(-kept), hit & (kept > 0)
    return loss, hit


@torch.no_grad()
def success(
    student: nn.Module, teacher: nn.Module, images: Tensor, said: Tensor, changes: Changes
) -> Tensor:
    """Which share of the images that the teacher does not call t a change to t turns.

    Returns:
        float32 (k, 3): shares that the student calls t, that the teacher calls t, and on which the
        student says t and the teacher still says what it said of the plain image.
    """
    rows = []
    for target, pattern in zip(changes.classes.tolist(), changes.patterns, strict=True):
        others = said != target
        changed = (pixels(images[others]) + pattern.to(images.device)).clamp(0, 1)
        student_says, teacher_says = student(changed).argmax(1), teacher(changed).argmax(1)
        alone = (student_says == target) & (teacher_says == said[others])
        rows.append(torch.stack([student_says == target, teacher_says == target, alone]))
    # Where all images are called t already there is nothing to turn.
    return torch.stack([row.float().sum(1) / max(row.shape[1], 1) for row in rows]).cpu()


def lead(logits: Tensor, classes: Tensor) -> Tensor:
    """By how much the logit of a class is above all others.

    Args:
        logits: float (..., K).
        classes: int64, broadcast to the leading dimensions.
    """
    index = classes.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, index, -math.inf).amax(-1)
    return logits.gather(-1, index)[..., 0] - others


def sized(patterns: Tensor, sizes: Tensor) -> Tensor:
    """Patterns of the same directions with these root mean squares, (k, C, H, W) and (k,)."""
    return patterns * (sizes / size_of(patterns))[:, None, None, None]


def size_of(patterns: Tensor) -> Tensor:
    """Root mean squares of patterns, (k,), no less than 1e-12; of any scale that is finite."""
    largest = patterns.abs().amax((1, 2, 3)).clamp(min=1e-12)
    shares = patterns / largest[:, None, None, None]
    return (largest * shares.square().mean((1, 2, 3)).sqrt()).clamp(min=1e-12)
