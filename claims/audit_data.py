"""Measures the false alarms of `foreshot audit data`: how many clean sets does it call suspicious?

    python claims/audit_data.py               # 90 audits; 40 seconds each on a busy core
    python claims/audit_data.py --sets 4      # fewer of each kind
    python claims/audit_data.py --distil      # with a student of each set; `alike` alone

Sets of `signs` that nobody has poisoned, of 2,000 images that the teacher has never seen, each kind
changed in its own way, image by image: compressed, noisy, blurred, or of sources of all kinds. Each
is audited as a user audits it, with 500 clean images: `alike`, drawn as the set was, which is what
the audit asks for; and `plain`, without the change, which it warns of. Teachers are those of three
seeds, by turns.

One JSON, claims/audit/data.json or data-distil.json, written after every set; the same command goes
on where it was interrupted, if source and machine are the same.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from measure import kept
from torch import Tensor

from foreshot.audit.data import audit
from foreshot.compute import Compute, compute
from foreshot.config import load_config
from foreshot.data import ImageSet
from foreshot.data.signs import render
from foreshot.defences import SCREENING
from foreshot.errors import ForeshotError
from foreshot.files import write_json
from foreshot.levels import to_float, to_uint8
from foreshot.metrics import wilson
from foreshot.progress import plain
from foreshot.record import environment
from foreshot.seeding import generator
from foreshot.stages import Stages
from foreshot.store import Store, home, source_digest
from foreshot.transforms import Transform, transform

FOLDER = Path(__file__).parent / "audit"
PRESET, SIDE = "signs", 32
SEEDS = (0, 1, 2)
IMAGES, CLEAN = 2000, 500
ALARM = 0.05
SOURCE = (
    *(*SCREENING, "audit/data.py", "audit/verdict.py", "audit/distilled.py", "distillation"),
    "data",
)
"""What the numbers depend on: a set is audited anew by another source."""
KINDS: dict[str, tuple[Transform, ...]] = {
    "plain": ("none",),
    "jpeg": ("jpeg",),
    "noise": ("noise",),
    "blur": ("blur",),
    "mixed": ("none", "jpeg", "noise", "blur", "resize"),
}
"""What is done to the images of a kind of set: one of these to each, by lot."""


def changed(images: Tensor, kind: str, number: int) -> Tensor:
    """Images (N, C, H, W), each changed in a way and by a strength of its own."""
    random, ways = generator(number, "audited", kind), KINDS[kind]
    lots = torch.randint(len(ways), (len(images),), generator=random).tolist()
    single = zip(images.split(1), lots, strict=True)
    return torch.cat([to_uint8(transform(to_float(x), ways[lot], random)) for x, lot in single])


def cells(sets: int, distil: bool) -> Iterator[tuple[str, str, int]]:
    """Kind of the set, clean images, and number: an early end leaves some of each."""
    for number in range(sets):
        for kind in KINDS:
            yield kind, "alike", number
            if kind != "plain" and not distil:
                yield kind, "plain", number


def measure(
    kind: str, clean: str, number: int, distil: bool, store: Store, engine: Compute
) -> dict[str, Any]:
    """One set, audited."""
    seed = SEEDS[number % len(SEEDS)]
    stages = Stages(load_config(PRESET, [f"seed={seed}"]), store, engine, home() / "data", plain)
    drawn, _ = render("audited", torch.arange(IMAGES + CLEAN) + number * 10_000, SIDE, 0)
    classes = stages.data.train.classes
    transfer = ImageSet(changed(drawn[:IMAGES], kind, number), None, classes)
    trusted = drawn[IMAGES:] if clean == "plain" else changed(drawn[IMAGES:], kind, -1 - number)
    teacher, began = stages.teacher().model, perf_counter()
    found = audit(
        transfer,
        teacher,
        clean=ImageSet(trusted, None, classes),
        distil=distil,
        alarm=ALARM,
        seed=number,
        compute=engine,
    )
    return {
        "p": found.set_p,
        "suspicious": found.suspicious,
        "left_out": int(found.left_out.sum()),
        "seed": seed,
        "seconds": round(perf_counter() - began, 1),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of how many sets of each kind, and of all, the verdict was suspicious; 95 % intervals."""
    alarms: Counter[str] = Counter()
    audited: Counter[str] = Counter()
    for row in rows:
        for group in (row["clean"], f"{row['clean']}, {row['kind']}"):
            audited[group] += 1
            alarms[group] += row["suspicious"]
    return {
        group: {"sets": count, "alarms": alarms[group], "interval": wilson(alarms[group], count)}
        for group, count in audited.items()
    }


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=10, help="of each kind")
    parser.add_argument("--distil", action="store_true", help="as `foreshot audit data --distil`")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    command, out = "python claims/audit_data.py", FOLDER / "data.json"
    if given.distil:
        command, out = f"{command} --distil", FOLDER / "data-distil.json"
    try:
        engine, circumstances = compute(given.device), environment()
        store = Store.open(plain)
        same = {
            "schema": 1,
            "preset": PRESET,
            "images": IMAGES,
            "clean": CLEAN,
            "alarm": ALARM,
            "code": source_digest(*SOURCE),
            **engine.describe(),
            **{key: circumstances[key] for key in ("versions", "host")},
        }
        about = same | {
            "command": command,
            "source": circumstances["source"],
        }
        rows = {(row["kind"], row["clean"], row["number"]): row for row in kept(out, same)}
        left = [cell for cell in cells(given.sets, given.distil) if cell not in rows]
        minutes = len(left) * (40 + 15 * given.distil) / 60
        print(f"{len(left)} sets left, about {minutes:.0f} minutes on a busy core")
        for cell in left:
            kind, clean, number = cell
            rows[cell] = {"kind": kind, "clean": clean, "number": number}
            rows[cell] |= measure(kind, clean, number, given.distil, store, engine)
            print(rows[cell], flush=True)
            date = datetime.now(UTC).date().isoformat()
            runs = list(rows.values())
            write_json(out, about | {"date": date, "summary": summary(runs), "runs": runs})
    except ForeshotError as error:
        print(f"audit_data: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
