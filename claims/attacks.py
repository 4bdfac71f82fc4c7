"""Measures attacks in settings where they are hard: small budgets, small triggers, augmentation.

    python claims/attacks.py                       # every row
    python claims/attacks.py signs-dot-1 --seeds 0 1 2
    python claims/attacks.py --plan                # what it would cost, and nothing else

Each row is a preset with some keys set; `ROWS` says what it has to reach. The surrogates of the
attacker have another architecture than the victim's student, and another seed. Teachers and poison
are shared through the store: run the same command again to go on. One JSON a row, in
claims/attacks/, written after each seed; a seed that fails stays in it.
"""

import argparse
import math
import shlex
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from measure import summary

from foreshot.compute import compute
from foreshot.config import load_config
from foreshot.errors import ForeshotError
from foreshot.experiment import run
from foreshot.files import read_json, write_json
from foreshot.progress import plain
from foreshot.record import environment

FOLDER = Path(__file__).parent / "attacks"


class Row(NamedTuple):
    """One setting.

    Args:
        preset: where it starts.
        must: the ASR that it has to reach, in %.
        settings: keys that are set.
    """

    preset: str
    must: int
    settings: tuple[str, ...]


OTHER = "attack.student={name: resnet, depth: 14, width: 0.5, stem_stride: 2}"
BLEND = "trigger={name: blend, opacity: 0.15}"
ROWS = {
    "signs-dot-5": Row("signs", 95, ("attack.epsilon=8", OTHER)),
    "signs-dot-1": Row("signs", 80, ("attack.epsilon=8", "attack.rate=0.01", OTHER)),
    "signs-dot-5-crop": Row(
        "signs",
        80,
        (
            "student.training.augment=crop",
            "attack.training.augment=crop",
            "attack.through=[crop]",
            "attack.draws=2",
            OTHER,
        ),
    ),
    "signs-blend-1": Row("signs", 80, ("attack.epsilon=8", "attack.rate=0.01", BLEND, OTHER)),
}


def measure(name: str, seeds: list[int], device: str, runs: Path) -> None:
    """Runs the seeds of a row; writes its JSON after each."""
    row = ROWS[name]
    config = load_config(row.preset, list(row.settings))
    options = [part for setting in row.settings for part in ("--set", setting)]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        began = time.perf_counter()
        seeded = load_config(row.preset, [*row.settings, f"seed={seed}"])
        result: dict[str, Any] = {"seed": seed, "ok": True}
        try:
            metrics = run(seeded, runs / f"{name}-{seed}", device=device, listener=plain)  # pyright: ignore[reportArgumentType]
            for model in (metrics["teacher"], metrics["student"], *metrics["controls"].values()):
                del model["per_class"]
            result["metrics"] = metrics
        except ForeshotError as error:
            result |= {"ok": False, "error": str(error)}
        seconds = time.perf_counter() - began
        asr = result["metrics"]["student"]["asr"]["value"] if result["ok"] else math.nan
        print(f"{name}, seed {seed}: ASR {asr:.1%}, {seconds:.0f} s", flush=True)
        rows.append(result)
        claim = {
            "schema": 1,
            "command": shlex.join(["foreshot", "run", row.preset, *options]),
            "config": config.model_dump(mode="json", exclude={"seed"}),
            "must": row.must,
            **compute(device, config.precision).describe(),  # pyright: ignore[reportArgumentType]
            **environment(),
            "date": datetime.now(UTC).date().isoformat(),
            "seeds": seeds[: len(rows)],
            "failed": [row["seed"] for row in rows if not row["ok"]],
            "summary": summary([row for row in rows if row["ok"]]),
            "runs": rows,
        }
        write_json(FOLDER / f"{name}.json", claim)


def plan(names: list[str], seeds: list[int]) -> str:
    """What it will cost, by what the presets have cost where they were measured."""
    minutes = 0.0
    for name in names:
        claim = read_json(FOLDER.parent / f"{ROWS[name].preset}.json")
        minutes += len(seeds) * claim["summary"]["wall_seconds"]["mean"] / 60
    return (
        f"{len(names)} rows, {len(seeds)} seeds: about {minutes:.0f} minutes on two AVX2 cores, if "
        "nothing is in the store"
    )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plan", action="store_true", help="say what it would cost, and stop")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    names = given.rows or list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"expected rows of {', '.join(ROWS)}, found {min(unknown)}")
    print(plan(names, given.seeds), flush=True)
    if given.plan:
        return
    with tempfile.TemporaryDirectory(prefix="foreshot-attacks-") as runs:
        for name in names:
            measure(name, given.seeds, given.device, Path(runs))


if __name__ == "__main__":
    main()
