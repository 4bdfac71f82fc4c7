"""Distillation by foreshot against the loops that people start from, in one run.

    python benchmarks/loops.py [--images N] [--epochs N] [--rounds N] [--json FILE]

Hinton's distillation of the same networks, from the same weights, with the same schedule,
temperature and size of batches, on `signs`, by five loops (what a crop lacks is black in PIL, and
mirrored elsewhere):

- `foreshot`: what `foreshot run` does; the teacher is asked once about each view;
- `loader`: the way of RepDistiller and mdistiller: a DataLoader with two workers, an image at a
  time through PIL, float32 in NCHW, the teacher asked at each step, meters read at each step;
- `torchdistill`: its DistillationBox, with the same DataLoader;
- `tutorial`: the way of `loader` without workers and meters, as in PyTorch's tutorial;
- `tensor`: the tutorial's loop over one float tensor, without PIL: what is left when only the
  loading is mended.

The loops take turns, `--rounds` times each; the figure is the median, and the ratio is of images/s.
Clean accuracy on unseen images shows that they come to the same student.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from foreshot.augment import augment
from foreshot.compute import Compute, compute
from foreshot.data import ImageSet, Signs
from foreshot.distillation import KD, Distiller, Term, kd
from foreshot.extras import imported
from foreshot.files import write_json
from foreshot.inference import logits, place
from foreshot.models import ResNet, build
from foreshot.record import environment
from foreshot.seeding import generator
from foreshot.training import Samples, Supervised, Training, fit

Loop = Callable[[nn.Module, nn.Module, ImageSet, Training], None]
AIM = 4.0
"""Times the images/s of `loader` that foreshot is to reach."""


def foreshot(
    student: nn.Module, teacher: nn.Module, images: ImageSet, training: Training, engine: Compute
) -> None:
    distiller = Distiller(student, teacher, [Term(KD(temperature=4))])
    samples = Samples(images.images, teacher=place(teacher, engine))
    fit(distiller, samples, training, engine, seed=0, stage="student")


class Pictures(Dataset[Tensor]):
    """One PIL image at a time, as datasets of files give it."""

    def __init__(self, images: ImageSet, training: Training) -> None:
        self.arrays = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.flip, self.crop = training.augment == "crop_flip", training.augment != "none"

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Tensor:
        picture = Image.fromarray(self.arrays[index])
        if self.crop:
            side, pad = picture.width, picture.width // 8
            left, top = torch.randint(2 * pad + 1, (2,)).tolist()
            picture = ImageOps.expand(picture, pad).crop((left, top, left + side, top + side))
        if self.flip and torch.rand(()) < 0.5:
            picture = ImageOps.mirror(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)


def peer(
    student: nn.Module,
    teacher: nn.Module,
    training: Training,
    batches: Callable[[], Iterable[Tensor]],
    count: int,
    meters: bool,
) -> None:
    """The loop that all peers share: float32, NCHW, the teacher asked at each step."""
    student.to(memory_format=torch.contiguous_format).train()  # pyright: ignore[reportCallIssue]
    teacher.to(memory_format=torch.contiguous_format).eval()  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=True,
    )
    done, total, losses, agreed = 0, count * training.epochs, 0.0, 0
    for _ in range(training.epochs):
        for x in batches():
            for group in optimizer.param_groups:
                group["lr"] = training.lr_at(done / total)
            said = student(x)
            with torch.no_grad():
                answers = teacher(x)
            loss = kd(said, answers, 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += len(x)
            if meters:
                losses += loss.item() * len(x)
                agreed += (said.argmax(1) == answers.argmax(1)).sum().item()


def loaded(
    student: nn.Module, teacher: nn.Module, images: ImageSet, training: Training, workers: int
) -> None:
    loader = DataLoader(
        Pictures(images, training),
        training.batch,
        shuffle=True,
        num_workers=workers,
        generator=generator(0, "loader"),
    )
    peer(student, teacher, training, lambda: loader, len(images), meters=workers > 0)


class Labelled(Dataset[tuple[Tensor, int]]):
    """The same with a label, which torchdistill expects and a loss of answers alone leaves be."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pictures[index], 0


def torchdistill(
    student: nn.Module, teacher: nn.Module, images: ImageSet, training: Training
) -> None:
    """Its own loop as its examples write it, with its KD loss and the schedule of the others."""
    imported("torchvision", "torchvision", "torchdistill")
    from torchdistill.core.distillation import DistillationBox

    def lr_at(step: int) -> float:
        return training.lr_at(step * training.batch / (len(images) * training.epochs)) / training.lr

    # With alpha 0 its loss leaves out the factor T^2, so the term's weight has to bring it.
    kd_loss = {"temperature": 4, "alpha": 0.0, "reduction": "batchmean"}
    for role in ("student", "teacher"):
        kd_loss |= {f"{role}_module_path": ".", f"{role}_module_io": "output"}
    criterion = {"key": "KDLoss", "kwargs": kd_loss}
    loader = {"batch_size": training.batch, "num_workers": 2}
    optimizer = {
        "lr": training.lr,
        "momentum": training.momentum,
        "weight_decay": training.weight_decay,
        "nesterov": True,
    }
    box = DistillationBox(
        teacher.to(memory_format=torch.contiguous_format).eval(),  # pyright: ignore[reportCallIssue]
        student.to(memory_format=torch.contiguous_format),  # pyright: ignore[reportCallIssue]
        {"train": Labelled(Pictures(images, training))},
        {
            "num_epochs": training.epochs,
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": RandomSampler},
                "kwargs": loader,
            },
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "SGD", "kwargs": optimizer},
            "scheduler": {"key": "LambdaLR", "kwargs": {"lr_lambda": lr_at}, "scheduling_step": 1},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": criterion, "weight": 4.0**2}}},
            },
        },
        torch.device("cpu"),
        None,
        False,
        1,
    )
    assert box.train_data_loader is not None
    meter = 0.0
    for epoch in range(training.epochs):
        box.pre_epoch_process(epoch=epoch)
        for x, y, more in box.train_data_loader:
            loss = box.forward_process(x, y, more)
            box.post_forward_process(loss=loss)
            meter += loss.item()


def tensor(student: nn.Module, teacher: nn.Module, images: ImageSet, training: Training) -> None:
    random = generator(0, "tensor")

    def batches() -> Iterable[Tensor]:
        for batch in torch.randperm(len(images), generator=random).split(training.batch):
            yield augment(images.images[batch], training.augment, random).float() / 255

    peer(student, teacher, training, batches, len(images), meters=False)


def measure(images: int, epochs: int, rounds: int, engine: Compute) -> dict[str, Any]:
    """All loops in turns, without augmentation and with it."""
    train, test = Signs(train=images, test=2000).load(Path())
    assert train.labels is not None
    assert test.labels is not None
    models = ResNet(depth=20, width=2, stem_stride=2), ResNet(depth=8, width=1, stem_stride=2)
    teacher = build(models[0], train.images, len(train.classes), 0, "teacher")
    taught = Training(epochs=4)
    samples = Samples(train.images, {"y": train.labels})
    fit(Supervised(teacher), samples, taught, engine, seed=0, stage="teacher")
    loops: dict[str, Loop] = {
        "foreshot": partial(foreshot, engine=engine),
        "loader": partial(loaded, workers=2),
        "torchdistill": torchdistill,
        "tutorial": partial(loaded, workers=0),
        "tensor": tensor,
    }
    results: dict[str, Any] = {}
    for augmentation in ("none", "crop_flip"):
        training = Training(epochs=epochs, augment=augmentation)
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        accuracy: dict[str, float] = {}
        for _ in range(rounds):
            for name, loop in loops.items():
                student = build(models[1], train.images, len(train.classes), 0, "student")
                own = deepcopy(teacher)
                began = time.perf_counter()
                loop(student, own, train, training)
                seconds[name].append(time.perf_counter() - began)
                said = logits(student, test.images, engine).argmax(1)
                accuracy[name] = (said == test.labels).float().mean().item()
        rates = {name: images * epochs / median(times) for name, times in seconds.items()}
        results[augmentation] = {
            name: {
                "images_per_second": rate,
                "foreshot_is_faster_by": rates["foreshot"] / rate,
                "seconds": seconds[name],
                "clean_accuracy": accuracy[name],
            }
            for name, rate in rates.items()
        }
        for name, row in results[augmentation].items():
            print(
                f"{augmentation:10} {name:12} {row['images_per_second']:7.0f} images/s, foreshot "
                f"{row['foreshot_is_faster_by']:.2f} times, accuracy {row['clean_accuracy']:.1%}",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    engine = compute("cpu")
    results = measure(given.images, given.epochs, given.rounds, engine)
    slowest = min(rows["loader"]["foreshot_is_faster_by"] for rows in results.values())
    print(f"at least {slowest:.2f} times the images/s of loader; the aim is {AIM:g}")
    if given.json:
        write_json(given.json, {"results": results, **engine.describe(), **environment()})


if __name__ == "__main__":
    main()
