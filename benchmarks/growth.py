"""How the cost of distillation grows with the images and with the width of the networks.

    python benchmarks/growth.py [--images N] [--rounds N] [--out FOLDER]

Hinton's distillation of ResNet-8 from ResNet-20 on `signs`, one epoch, the teacher asked once: for
N, 4 N and 16 N images at width 1, and for N images at widths 1, 2 and 4. Each measurement is a
process of its own, so that its peak memory is its own; time is that of the epoch alone, the median
of the rounds. Writes growth.json and growth.png.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from foreshot.compute import compute
from foreshot.data import Signs
from foreshot.distillation import KD, Distiller, Term
from foreshot.files import write_json
from foreshot.inference import logits
from foreshot.models import ResNet, build
from foreshot.record import environment
from foreshot.training import Samples, Training, fit

FACTORS = (1, 4, 16)
WIDTHS = (1, 2, 4)


def once(images: int, width: int) -> dict[str, float]:
    """One epoch in this process: seconds, and its peak memory in MiB."""
    engine = compute("cpu")
    train = Signs(train=images, test=1).load(Path()).train
    student, teacher = (
        build(ResNet(depth=d, width=width, stem_stride=2), train.images, 43, 0, f"{d}")
        for d in (8, 20)
    )
    distiller, schedule = Distiller(student, teacher, [Term(KD())]), Training(epochs=1, lr=0.05)

    def epoch(part: Tensor) -> float:
        began = time.perf_counter()
        samples = Samples(part, {"teacher_logits": logits(teacher, part, engine)})
        fit(distiller, samples, schedule, engine, seed=0, stage="student")
        return time.perf_counter() - began

    epoch(train.images[:256])  # what a process does for the first time takes longer
    seconds = epoch(train.images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}


def apart(images: int, width: int, rounds: int) -> dict[str, float]:
    """The same in processes of their own: medians."""
    command = [sys.executable, __file__, "--once", str(images), str(width)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(rounds)
    ]
    row = {key: median(one[key] for one in found) for key in ("seconds", "mib")}
    print(
        f"{images:7} images, width {width}: {row['seconds']:6.1f} s, {row['mib']:5.0f} MiB, "
        f"{images / row['seconds']:5.0f} images/s",
        flush=True,
    )
    return {**row, "images": images, "width": width}


def exponent(rows: list[dict[str, float]], of: str, over: str) -> float:
    """The power of `over` with which `of` grows from the first row to the last."""
    first, last = rows[0], rows[-1]
    return math.log(last[of] / first[of]) / math.log(last[over] / first[over])


def draw(by_images: list[dict[str, float]], by_width: list[dict[str, float]], path: Path) -> None:
    """Time and memory against both, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, rows, over in zip(
        figure.subplots(1, 2), (by_images, by_width), ("images", "width"), strict=True
    ):
        x = [row[over] for row in rows]
        axes.loglog(x, [row["seconds"] for row in rows], "o-", label="seconds an epoch")
        axes.loglog(x, [row["mib"] for row in rows], "s--", label="peak memory, MiB")
        axes.set(xlabel=over, xticks=x, xticklabels=[f"{value:,}" for value in x])
        axes.minorticks_off()
        axes.set_title(f"time grows as {over}^{exponent(rows, 'seconds', over):.2f}")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for growth.json and growth.png")
    parser.add_argument("--once", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(once(*given.once)))
        return
    by_images = [apart(given.images * factor, 1, given.rounds) for factor in FACTORS]
    by_width = [by_images[0]] + [apart(given.images, w, given.rounds) for w in WIDTHS[1:]]
    for rows, over in ((by_images, "images"), (by_width, "width")):
        print(f"time grows as {over}^{exponent(rows, 'seconds', over):.2f}")
    if given.out:
        result: dict[str, Any] = {"images": by_images, "width": by_width, **environment()}
        write_json(given.out / "growth.json", result)
        draw(by_images, by_width, given.out / "growth.png")


if __name__ == "__main__":
    main()
