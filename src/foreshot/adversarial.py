"""Adversarial examples, and the network that learns to tell them from clean images.

A defender screens with such a network, and an attacker who knows that trains one to get past it.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshot.compute import Compute
from foreshot.inference import evaluating, pixels
from foreshot.levels import to_uint8
from foreshot.models import ResNet, build
from foreshot.progress import Listener, silent
from foreshot.seeding import generator
from foreshot.training import Samples, Supervised, Training, fit

EXAMPLES = 2000
"""Pairs of an image and what was made of it that a detector learns from, however many images there
are: of few, more is made of each."""
BLIND = 4
"""One batch of examples in so many is perturbed without the teacher. On fashion-mnist-10k, a
detector that had seen no others took poison for cleaner than clean images, and one that had seen
none of them found far less of it."""
STEPS = 8
SIDE = 16
"""A detector learns from parts of images, of that side: perturbations are everywhere, and parts
cost less. It looks at images as wholes."""
BATCH = 32


def perturbed(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    steps: int,
    random: torch.Generator | None,
    *,
    targeted: bool = False,
) -> Tensor:
    """Images near `x` that the network takes for `y` less, or more (Madry et al., 1706.06083).

    Steps of min(1.25, 2.5 / steps) epsilon along the sign of the gradient of the cross-entropy,
    from a uniformly random start in the box.

    Args:
        network: float (n, C, H, W) in [0, 1] -> logits (n, K).
        x: float (n, C, H, W) in [0, 1].
        y: classes, int64 (n,).
        epsilon: L-inf radius, in the pixel range [0, 1]; one for all, or (n, 1, 1, 1).
        steps: of the gradient.
        random: of the start, on the CPU; None is torch's own.
        targeted: whether `y` is what the network is to say, rather than what it is not to.
    """
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    z = low + (high - low) * torch.rand(x.shape, generator=random).to(x)
    step = min(1.25, 2.5 / steps) * epsilon * (-1 if targeted else 1)
    for _ in range(steps):
        z = z.detach().requires_grad_()
        loss = F.cross_entropy(network(z.clone()).float(), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z.detach() + step * gradient.sign()).maximum(low).minimum(high)
    return z


@torch.inference_mode(False)
@torch.enable_grad()
def detector(
    teacher: nn.Module,
    images: Tensor,
    compute: Compute,
    *,
    seed: int,
    stage: str,
    level: float = 16,
    epochs: int = 12,
    listener: Listener = silent,
) -> nn.Module:
    """A small network, taught to tell perturbed images from clean ones (Gong et al., 1704.04960).

    It sees as many clean as perturbed images. Of these, three in four are adversarial examples of
    the teacher towards random classes, and the others carry random signs; their radius is random.

    Args:
        teacher: float (n, C, H, W) in [0, 1] -> logits (n, K), whose gradient is asked for.
        images: clean ones, uint8 (N, C, H, W).
        compute: where to run.
        seed: whatever is drawn follows from it and from `stage`.
        stage: what is trained; events have its name.
        level: largest perturbation of a pixel, in 1/255; from 4 on. The least is an eighth of it,
            of which an 8-bit image would keep nothing if it were less.
        epochs: passes over the examples.
        listener: hears of the progress.

    Returns:
        float (n, C, h, w) in [0, 1] -> the log-odds that an image is perturbed, (n,); frozen.
    """
    random = generator(seed, stage, "examples")
    clean, changed = examples(teacher, images, level / 255, random, compute)
    both = torch.cat([clean, changed])
    network = build(ResNet(depth=8, width=0.5), both, 2, seed, stage)
    y = torch.tensor([0, 1]).repeat_interleave(len(clean))
    fit(
        Supervised(network),
        Samples(both, {"y": y}),
        Training(epochs=epochs),
        compute,
        seed=seed,
        stage=stage,
        listener=listener,
    )
    return LogOdds(network).requires_grad_(False).eval()


def examples(
    teacher: nn.Module, images: Tensor, epsilon: float, random: torch.Generator, compute: Compute
) -> tuple[Tensor, Tensor]:
    """`EXAMPLES` parts of the images, and the same perturbed; uint8 (m, C, h, w) each.

    Args:
        teacher: whose adversarial examples they are.
        images: uint8 (N, C, H, W).
        epsilon: largest radius, in the pixel range [0, 1]; the smallest is an eighth of it.
        random: on the CPU.
        compute: where to run.
    """
    rounds = range(ceil(EXAMPLES / len(images)))
    order = torch.cat([torch.randperm(len(images), generator=random) for _ in rounds])[:EXAMPLES]
    clean, changed = [], []
    with evaluating(teacher):
        with torch.no_grad():
            classes = teacher(pixels(images[:1].to(compute.device))).shape[1]
        for number, part in enumerate(order.split(BATCH)):
            x = pixels(images[part].to(compute.device))
            share = torch.rand((len(x), 1, 1, 1), generator=random).to(x)
            radius = epsilon * (1 + 7 * share) / 8
            if number % BLIND:
                y = torch.randint(classes, (len(x),), generator=random).to(x.device)
                z = perturbed(teacher, x, y, radius, STEPS, random, targeted=True)
            else:
                signs = 2 * torch.randint(2, x.shape, generator=random) - 1
                z = (x + radius * signs.to(x)).clamp(0, 1)
            top, left = (
                int(torch.randint(max(side - SIDE, 0) + 1, (), generator=random))
                for side in x.shape[2:]
            )
            for seen, of in ((clean, x), (changed, z)):
                seen.append(to_uint8(of[..., top : top + SIDE, left : left + SIDE]).cpu())
    return torch.cat(clean), torch.cat(changed)


class LogOdds(nn.Module):
    """By how much the second of two logits exceeds the first: (n,) of images (n, C, H, W)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        said = self.network(x).float()
        return said[:, 1] - said[:, 0]
