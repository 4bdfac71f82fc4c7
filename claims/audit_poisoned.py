"""Measures what `foreshot audit data` finds: is a poisoned set called suspicious, is it cleaned?

    python claims/audit_poisoned.py                       # three attacks on two data sets, seed 0
    python claims/audit_poisoned.py --attacks pgd fgsm    # others of claims/defences.py
    python claims/audit_poisoned.py --seeds 0 1 2

Set, teacher and 1,000 clean images are those of the matrix (claims/defences.py). Each set is
audited without a student and with `--distil`, and without the second teacher, which an engineer
may not have.

One JSON, claims/audit/poisoned.json, written after every set; the same command goes on where it was
interrupted, if source and machine are the same.
"""

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from audit_data import SOURCE
from measure import kept

from defences import ATTACKS, SETTINGS, UNDEFENDED, config_of
from foreshot.audit.data import audit
from foreshot.compute import Compute, compute
from foreshot.errors import ForeshotError
from foreshot.files import write_json
from foreshot.progress import plain
from foreshot.record import environment
from foreshot.stages import CRAFTING, Stages
from foreshot.store import Store, home, source_digest

OUT = Path(__file__).parent / "audit" / "poisoned.json"
SEVERAL = ("counterfactual", "pgd, 1 %", "dehib")


def measure(
    preset: str, attack: str, seed: int, distil: bool, store: Store, engine: Compute
) -> dict[str, Any]:
    """One set, audited."""
    config = config_of(preset, attack, UNDEFENDED, seed)
    stages = Stages(config, store, engine, home() / "data", plain)
    teacher = stages.teacher()
    stages.learn_trigger(teacher)
    poison = stages.poison(teacher).poison
    clean = stages.parts.clean
    assert clean is not None
    began = perf_counter()
    found = audit(
        replace(poison.apply(stages.data.train), labels=None),
        teacher.model,
        clean=replace(clean, labels=None),
        distil=distil,
        seed=seed,
        compute=engine,
    )
    bad = torch.zeros(len(found.p), dtype=torch.bool).index_fill_(0, poison.indices, True)
    return {
        "verdict": found.verdict,
        "p": found.set_p,
        "poison": len(poison),
        "left_out": int(found.left_out.sum()),
        "poison_left_out": int(found.left_out[bad].sum()),
        "target_found": None if found.target is None else found.target == config.target,
        "seconds": round(perf_counter() - began, 1),
    }


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(SEVERAL))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    try:
        engine, circumstances = compute(given.device), environment()
        store = Store.open(plain)
        same = {
            "schema": 1,
            "code": source_digest(*{*SOURCE, *CRAFTING, "stages.py", "division.py"}),
            **engine.describe(),
            **{key: circumstances[key] for key in ("versions", "host")},
        }
        about = same | {
            "command": "python claims/audit_poisoned.py",
            "source": circumstances["source"],
        }
        keys = ("preset", "attack", "seed", "distil")
        rows = {tuple(row[key] for key in keys): row for row in kept(OUT, same)}
        wanted = product(given.presets, given.attacks, given.seeds, (False, True))
        left = [cell for cell in wanted if cell not in rows]
        print(f"{len(left)} audits left, of 20 to 170 seconds each, and their poison")
        for cell in left:
            rows[cell] = dict(zip(keys, cell, strict=True)) | measure(*cell, store, engine)
            print(rows[cell], flush=True)
            date = datetime.now(UTC).date().isoformat()
            write_json(OUT, about | {"date": date, "runs": list(rows.values())})
    except ForeshotError as error:
        print(f"audit_poisoned: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
