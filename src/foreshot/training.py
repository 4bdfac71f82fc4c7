"""The one training loop: teacher, student and repair all go through `fit`."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreshot.augment import Augmentation, augment, draw_views
from foreshot.compute import Compute
from foreshot.data.base import check_images
from foreshot.errors import ForeshotError
from foreshot.family import Part
from foreshot.files import read_tensors, write_tensors
from foreshot.inference import pixels, place
from foreshot.progress import Event, Listener, silent
from foreshot.recall import Recall
from foreshot.seeding import drawing, generator
from foreshot.together import even, parallel, rank, share, size, summed

TRAINING = (
    "compute.py",
    "training.py",
    "recall.py",
    "augment.py",
    "inference.py",
    "levels.py",
    "models",
    "seeding.py",
    "taps.py",
    "together.py",
)
"""Sources of a training."""


class Training(Part):
    """How a network is trained: SGD with Nesterov momentum.

    Args:
        epochs: passes over the set.
        batch: images a step at most: an epoch is divided as evenly as can be.
        lr: peak learning rate; it rises linearly from zero over `warmup` and falls by a cosine.
        warmup: share of the steps before the peak.
        milestones: shares of the steps at which the learning rate falls to a tenth, in place of
            the cosine.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty.
        augment: the views that the network sees: none, crop, crop_flip, strong or strong_no_flip.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    batch: Annotated[int, Field(ge=2)] = 128
    lr: Annotated[float, Field(gt=0)] = 0.2
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.25
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    augment: Augmentation = "none"

    def lr_at(self, progress: float) -> float:
        """Learning rate after `progress` (0 to 1) of the steps."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        if self.milestones:
            return self.lr * 0.1 ** sum(progress >= milestone for milestone in self.milestones)
        return self.lr * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))) / 2


@dataclass(frozen=True, eq=False)
class Samples:
    """What is trained on.

    Args:
        images: uint8 (N, C, H, W).
        targets: what the module takes beside the images, by argument name; each (N, ...).
        teacher: a frozen network whose logits of the very views the module takes as
            `teacher_logits`; a view that comes up again is not asked about again.
        weights: the share of the epochs in which each image is seen, float (N,) in [0, 1], drawn
            anew for each epoch; None is all of them.
    """

    images: Tensor
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: nn.Module | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        check_images(self.images)


AHEAD = 8
"""Batches whose views a teacher is asked about together."""


class Supervised(nn.Module):
    """Cross-entropy of a network with the labels, as a module that `fit` can train."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.network(x).float(), y)}


def fit(
    module: nn.Module,
    samples: Samples,
    training: Training,
    compute: Compute,
    *,
    seed: int,
    stage: str,
    label: str | None = None,
    listener: Listener = silent,
    checkpoint: Path | None = None,
    watch: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Trains `module` in place; what it ends as does not depend on whether it was interrupted.

    Where several processes train together, each sees its share of every batch, and gradients are
    means over all shares. What looks at a batch as a whole sees a share: BatchNorm, which keeps the
    statistics of the first process, and losses that compare images.

    Args:
        module: float (n, C, H, W) in [0, 1] and the targets of the same samples, as keywords ->
            a dict whose "loss" is the batch's mean loss. It may print nothing and sync nothing.
        samples: the set.
        training: epochs, schedule, augmentation.
        compute: device and precision.
        seed: seed of the experiment; order, augmentation and what layers draw follow from it and
            from `stage`; what layers draw, in each process by itself.
        stage: what is trained: it keys the randomness.
        label: what the events call it; `stage` if None.
        listener: hears of the progress.
        checkpoint: a file for the state after each epoch; if it is there, training goes on from it.
        watch: figures of the network as it is, told after each epoch beside the loss.

    Raises:
        ForeshotError: the loss is not finite, or the batches are too small for the processes.
    """
    label = label or stage
    if size() > 1 and min(training.batch, len(samples.images)) < 2 * size():
        raise ForeshotError(
            f"{label}: expected batches of two images or more for each of {size()} processes, "
            f"found {min(training.batch, len(samples.images))} in all"
        )
    device = compute.device
    place(module, compute).train()
    images = samples.images.to(device) if compute.holds(samples.images.nbytes) else samples.images
    targets = {name: tensor.to(device) for name, tensor in samples.targets.items()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.momentum > 0,
        fused=True,
    )
    count, shape = len(images), (images.shape[1], images.shape[2], images.shape[3])
    recall = None
    if samples.teacher is not None:
        recall = Recall(samples.teacher, images, training.augment, compute)
    total = count * training.epochs
    start = 0
    if checkpoint and checkpoint.exists():
        try:
            start = _resume(checkpoint, module, optimizer, parameters)
        except ForeshotError as error:
            listener(Event(label, "note", message=f"{error}; it starts anew"))
            checkpoint.unlink(missing_ok=True)
    trained = parallel(module)
    told = f"{training.epochs} epochs of {count:,} images{f', {start} done before' * bool(start)}"
    listener(Event(label, "start", start * count, total, message=told))
    for epoch in range(start, training.epochs):
        began = time.perf_counter()
        losses, steps, failed = torch.zeros((3,), device=device).unbind()
        # On the CPU, as are the views: what is looked up by them never waits for the device.
        order = torch.randperm(count, generator=generator(seed, stage, "order", epoch))
        if samples.weights is not None:
            lot = torch.rand(count, generator=generator(seed, stage, "weights", epoch))
            order = order[lot[order] < samples.weights[order]]
        random = generator(seed, stage, "augment", epoch)
        views = draw_views(count, shape, training.augment, random)
        if rank():
            random = generator(seed, stage, "augment", epoch, rank())
        done = 0
        # As even as can be: a last batch of a few images would spoil BatchNorm's statistics.
        batches = order.tensor_split(max(1, math.ceil(len(order) / training.batch)))
        for number, batch in enumerate(batches):
            if recall and number % AHEAD == 0:
                ahead = torch.cat([share(each) for each in batches[number : number + AHEAD]])
                recall.prepare(ahead, views[ahead])
            if len(batch) < 2 * size():  # of so few BatchNorm has no variance
                continue
            mine = share(batch)
            for group in optimizer.param_groups:
                group["lr"] = training.lr_at((epoch * count + done * count / len(order)) / total)
            index = mine.to(device, non_blocking=True)
            seen = images[mine.to(images.device, non_blocking=True)].to(device, non_blocking=True)
            x = pixels(augment(seen, training.augment, random, views[mine]))
            given = {name: tensor[index] for name, tensor in targets.items()}
            if recall:
                given["teacher_logits"] = recall(mine, views[mine])
            # Dropout and the like draw from torch's own generators.
            draws = drawing(seed, stage, "layers", epoch, number, rank(), device=device)
            with draws, compute.autocast():
                loss = trained(x, **given)["loss"]
            optimizer.zero_grad(set_to_none=True)
            # Shares may differ by one image; the mean over processes is to be that over the batch.
            (loss * (len(mine) * size() / len(batch))).backward()
            # From the first step whose loss is not finite on, the weights stay as they were; the
            # host hears of it at the end of the epoch, and never waits for the device before.
            failed = failed.maximum(summed((~loss.detach().isfinite()).float()).clamp(max=1))
            optimizer.found_inf = failed  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
            steps += 1 - failed
            losses += loss.detach() * len(mine)
            done += len(batch)
            listener(Event(label, "advance", epoch * count + done, total))
        mean = summed(losses).item() / max(done, 1)
        if failed.item():
            step = int(steps.item())
            batch = batches[step].tolist()
            kept = ""
            if checkpoint and not rank():
                state = checkpoint.with_name(".failed.safetensors")
                about = {"epochs": epoch, "step": step, "batch": batch}
                _save(state, module, optimizer, parameters, about)
                kept = f"; the parameters before it, and the whole batch, are in {state}"
            raise ForeshotError(
                f"{label}: the loss became {mean} at step {step + 1} of epoch {epoch + 1}, images "
                f"{', '.join(map(str, batch[:8]))}{', ...' * (len(batch) > 8)} of the set; lower "
                f"the learning rate (lr {training.lr}) or look at these images{kept}"
            )
        values = {"loss": mean, "images/s": done / (time.perf_counter() - began)}
        values |= watch() if watch else {}
        turn = f"{epoch + 1} of {training.epochs}"
        listener(Event(label, "epoch", (epoch + 1) * count, total, values, turn))
        if checkpoint and epoch + 1 < training.epochs and not rank():
            _save(checkpoint, module, optimizer, parameters, {"epochs": epoch + 1})
    listener(Event(label, "end", total, total))
    even(module)
    module.eval()


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.SGD,
    parameters: list[nn.Parameter],
    about: Mapping[str, int | list[int]],
) -> None:
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for i, parameter in enumerate(parameters):
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            state[f"momentum.{i}"] = momentum
    write_tensors(path, state, about)


def _resume(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.SGD,
    parameters: list[nn.Parameter],
) -> int:
    """Loads the checkpoint; returns the number of epochs that it has behind it."""
    state, about = read_tensors(path)
    module.load_state_dict(
        {k.removeprefix("module."): v for k, v in state.items() if k.startswith("module.")}
    )
    for i, parameter in enumerate(parameters):
        if f"momentum.{i}" in state:
            momentum = torch.empty_like(parameter).copy_(state[f"momentum.{i}"])
            optimizer.state[parameter]["momentum_buffer"] = momentum
    return int(about["epochs"])
