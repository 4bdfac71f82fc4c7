"""Measures attacks in settings where they are hard: small budgets, small triggers, augmentation.

    python claims/attacks.py                       # every row
    python claims/attacks.py signs-dot-1 --seeds 0 1 2
    python claims/attacks.py --plan                # what it would cost, and nothing else

Each row is a preset with some keys set; `ROWS` says what it has to reach. The surrogates of the
attacker have another architecture than the victim's student, and another seed. Measured as by
`measure.py`: one JSON a row, in claims/attacks/; run the same command again to go on.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

from measure import measure

from foreshot.files import read_json

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


def plan(names: list[str], seeds: list[int]) -> str:
    """What it will cost, by what the presets have cost where they were measured."""
    minutes = 0.0
    for name in names:
        claim = read_json(FOLDER.parent / f"{ROWS[name].preset}.json")
        minutes += len(seeds) * claim["summary"]["wall_seconds"]["mean"] / 60
    return f"{len(names)} rows, {len(seeds)} seeds: about {minutes:.0f} minutes on two AVX2 cores"


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
            row, folder = ROWS[name], Path(runs) / name
            print(f"{name}: ASR of {row.must} % at least", flush=True)
            out = FOLDER / f"{name}.json"
            measure(row.preset, given.seeds, list(row.settings), out, folder, given.device)


if __name__ == "__main__":
    main()
