"""Crafting by foreshot against the libraries of adversarial attacks, in one run.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/crafting.py [--images N] [--rounds N] [--json FILE]

The same attack on the same images of `signs` with the preset's teacher: PGD in 40 signed steps of
1/255 to the preset's target, epsilon 16/255, from a random start, 64 images at a time, 8-bit images
in and out:

- `foreshot`: what `foreshot run` does, without a trigger;
- `torchattacks`, `foolbox`, `art` (adversarial-robustness-toolbox): each as its manual calls it,
  float32 in NCHW;
- `torchattacks-nhwc`: the same with the teacher laid out channels last: what is left when only the
  layout is mended.

They take turns, `--rounds` times each; the figure is the median, and the ratio is of images/s. The
success rate is the share of the rounded images that the teacher calls the target. What crafting
costs beside the network is its time for each image and step over that of one bare forward and
backward to the input, of the same frozen network in the same batches.
"""

import argparse
import io
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foreshot.attacks import PerturbationOnly
from foreshot.attacks.crafting import CHUNK
from foreshot.attacks.folding import frozen
from foreshot.compute import Compute, compute
from foreshot.config import load_config
from foreshot.extras import imported
from foreshot.files import write_json
from foreshot.inference import logits, pixels
from foreshot.levels import to_float, to_uint8
from foreshot.progress import silent
from foreshot.record import environment
from foreshot.stages import Stages
from foreshot.store import Store, home
from foreshot.triggers import Dot
from foreshot.views import AttackerView

Crafter = Callable[[Tensor], Tensor]
"""uint8 (N, C, H, W) -> the same, perturbed."""
EPSILON, STEPS = 16, 40
STEP = 2.5 * EPSILON / STEPS
AIM, COST = 2.0, 1.3
"""Times the images/s of the fastest library, and times a bare forward and backward, at the most."""
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")


def foreshot(teacher: nn.Module, target: int, engine: Compute) -> Crafter:
    attack = PerturbationOnly(epsilon=EPSILON, steps=STEPS, step=STEP, retries=0)

    def craft(images: Tensor) -> Tensor:
        everything = torch.arange(len(images))
        view = AttackerView(images, teacher, Dot(), target, 0, engine, everything)
        return attack.craft(view).images

    return craft


def batched(perturb: Crafter) -> Crafter:
    """What takes and gives floats, with a batch at a time."""
    return lambda images: torch.cat(
        [to_uint8(perturb(to_float(batch))) for batch in images.split(CHUNK)]
    )


def torchattacks(teacher: nn.Module, target: int) -> Crafter:
    library = imported("torchattacks", "bench", "torchattacks")
    with redirect_stdout(io.StringIO()):
        attack = library.PGD(teacher, eps=EPSILON / 255, alpha=STEP / 255, steps=STEPS)
        attack.set_mode_targeted_by_function(lambda _images, labels: labels)
    return batched(lambda x: attack(x, torch.full((len(x),), target)))


def foolbox(teacher: nn.Module, target: int) -> Crafter:
    library = imported("foolbox", "bench", "foolbox")
    model = library.PyTorchModel(teacher, bounds=(0, 1), device="cpu")
    attack = library.attacks.LinfPGD(abs_stepsize=STEP / 255, steps=STEPS, random_start=True)

    def perturb(x: Tensor) -> Tensor:
        wanted = library.criteria.TargetedMisclassification(torch.full((len(x),), target))
        return attack(model, x, wanted, epsilons=EPSILON / 255)[1]

    return batched(perturb)


def art(teacher: nn.Module, target: int, shape: tuple[int, int, int], classes: int) -> Crafter:
    estimators = imported("art.estimators.classification", "bench", "art")
    attacks = imported("art.attacks.evasion", "bench", "art")
    loss = nn.CrossEntropyLoss()
    model = estimators.PyTorchClassifier(
        teacher, loss, shape, classes, clip_values=(0, 1), device_type="cpu"
    )
    attack = attacks.ProjectedGradientDescent(
        model,
        eps=EPSILON / 255,
        eps_step=STEP / 255,
        max_iter=STEPS,
        targeted=True,
        num_random_init=1,
        batch_size=CHUNK,
        verbose=False,
    )

    def craft(images: Tensor) -> Tensor:
        wanted = torch.full((len(images),), target).numpy()
        return to_uint8(torch.from_numpy(attack.generate(to_float(images).numpy(), wanted)))

    return craft


def bare(teacher: nn.Module, images: Tensor, engine: Compute) -> Callable[[], None]:
    """As many forwards and backwards as one chunk takes."""
    model, x = frozen(teacher, engine), pixels(images[:CHUNK]).requires_grad_()
    with engine.autocast():
        upstream = torch.ones_like(model(x))

    def work() -> None:
        for _ in range(STEPS):
            with engine.autocast():
                said = model(x)
            torch.autograd.grad(said, x, upstream)

    return work


def measure(count: int, rounds: int, engine: Compute) -> dict[str, Any]:
    """All of them in turns."""
    config = load_config("signs")
    stages = Stages(config, Store(home() / "store"), engine, home() / "data", silent)
    train, teacher, target = stages.data.train, stages.teacher().model, config.target
    said = logits(teacher, train.images, engine).argmax(1)
    images = train.images[said != target][:count]

    def copy(layout: torch.memory_format) -> nn.Module:
        return deepcopy(teacher).eval().to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    plain, nhwc = torch.contiguous_format, torch.channels_last
    crafters: dict[str, Crafter] = {
        "foreshot": foreshot(teacher, target, engine),
        "torchattacks": torchattacks(copy(plain), target),
        "torchattacks-nhwc": torchattacks(copy(nhwc), target),
        "foolbox": foolbox(copy(plain), target),
        "art": art(copy(plain), target, train.shape, len(train.classes)),
    }
    network = bare(teacher, images, engine)
    times: dict[str, list[float]] = {name: [] for name in ("bare", *crafters)}
    found = {name: crafter(images[:CHUNK]) for name, crafter in crafters.items()}  # warms up
    network()
    for _ in range(rounds):
        for name, crafter in crafters.items():
            began = time.perf_counter()
            found[name] = crafter(images)
            times[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        network()
        times["bare"].append(time.perf_counter() - began)
    rates = {name: len(images) / median(times[name]) for name in crafters}
    results: dict[str, Any] = {}
    for name, rate in rates.items():
        said = logits(teacher, found[name], engine).argmax(1)
        row = results[name] = {
            "images_per_second": rate,
            "foreshot_is_faster_by": rates["foreshot"] / rate,
            "seconds": times[name],
            "success": (said == target).float().mean().item(),
            "linf_255": (found[name].short() - images.short()).abs().max().item(),
        }
        print(
            f"{name:18} {rate:7.1f} images/s, foreshot {row['foreshot_is_faster_by']:.2f} times, "
            f"success {row['success']:.1%}, largest change {row['linf_255']}/255",
            flush=True,
        )
    cost = CHUNK / median(times["bare"]) / rates["foreshot"]
    return {"images": len(images), "results": results, "over_bare": cost, "bare": times["bare"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    engine = compute("cpu")
    found = measure(given.images, given.rounds, engine)
    _, *peers = found["results"].items()
    name, row = min(peers, key=lambda item: item[1]["foreshot_is_faster_by"])
    print(f"{row['foreshot_is_faster_by']:.2f} times the images/s of {name}; the aim is {AIM:g}")
    print(f"{found['over_bare']:.2f} times a bare forward and backward; at the most {COST:g}")
    if given.json:
        peers = {package: version(package) for package in PEERS}
        write_json(given.json, {**found, "peers": peers, **engine.describe(), **environment()})


if __name__ == "__main__":
    main()
