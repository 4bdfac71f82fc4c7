"""Whether torch.compile pays for a step of distillation, on this machine.

    python benchmarks/compiled.py [--rounds N] [--json FILE]

A step of a student, as `fit` takes it with the teacher's answers kept: forward, Hinton's loss,
backward, SGD, on a batch of 128 images of 32 x 32. Eager and compiled take turns; the figures are
medians. Compiling pays for itself after `pays_after_steps`, if a compiled step is the faster one.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from foreshot.compute import Compute, compute
from foreshot.distillation import KD, Distiller, Term
from foreshot.files import write_json
from foreshot.inference import pixels, place
from foreshot.models import ResNet, build
from foreshot.record import environment

STUDENTS = {
    "the preset signs'": ResNet(depth=8, width=0.75, stem_stride=2),
    "ResNet-8": ResNet(depth=8, width=1, stem_stride=2),
    "ResNet-20": ResNet(depth=20, width=1),
}
STEPS = 10
"""Steps of a turn."""


def measure(student: ResNet, rounds: int, engine: Compute) -> dict[str, Any]:
    """Seconds of a step, eager and compiled."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, generator=random)
    x, answers = pixels(images.to(engine.device)), torch.randn(128, 43, generator=random)
    answers = answers.to(engine.device)
    networks = [place(build(student, images, 43, 0, role), engine) for role in ("student", "x")]
    module = Distiller(networks[0].train(), networks[1], [Term(loss=KD(temperature=4))])
    parameters = networks[0].parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, fused=True)

    def turn(distiller: nn.Module, steps: int = STEPS) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            with engine.autocast():
                loss = distiller(x, teacher_logits=answers)["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    compiled: nn.Module = torch.compile(module)  # pyright: ignore[reportAssignmentType]
    turn(module)
    warm = turn(compiled, 1)
    pairs = [(turn(module), turn(compiled)) for _ in range(rounds)]
    eager, faster = (median(column) for column in zip(*pairs, strict=True))
    gained = eager - faster
    return {
        "eager_seconds": eager,
        "compiled_seconds": faster,
        "compiled_is_faster_by": eager / faster,
        "compiling_seconds": warm,
        "pays_after_steps": round(warm / gained) if gained > 0 else None,
    }


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    engine = compute(given.device)
    results = {}
    for name, student in STUDENTS.items():
        found = results[name] = measure(student, given.rounds, engine)
        after = found["pays_after_steps"]
        pays = "never pays" if after is None else f"pays after {after:,} steps"
        print(
            f"{name:18} {1000 * found['eager_seconds']:6.1f} ms, compiled "
            f"{1000 * found['compiled_seconds']:6.1f} ms ({found['compiled_is_faster_by']:.2f} "
            f"times), compiling {found['compiling_seconds']:.0f} s: {pays}",
            flush=True,
        )
    if given.json:
        write_json(given.json, {"results": results, **engine.describe(), **environment()})


if __name__ == "__main__":
    main()
