r"""Measures `foreshot audit student`: on how many students is it right?

    python claims/map.py                             # leaves students of many attacks in the store
    python claims/audit_student.py                   # audits them, and some more clean ones
    python claims/audit_student.py --seeds 1 2 --more 0 --store DIR
    python claims/audit_student.py --preset fashion-mnist-10k --out FILE \
        --set defender.clean=99 --set defence.name=relative_unlearning

The last line audits students that `claims/defences.py` has left. Every student of the preset and
its settings that the store holds with its rates, as it was distilled, is audited with its teacher
and the same 500 clean images, and `--more` clean ones a seed, which are distilled from the same
teacher with other seeds. The audit learns nothing of trigger, target and rates. It was developed on
students of `signs` of seed 0, `DEVELOPMENT`; the summary is of the other seeds alone. The constants
that make a p-value of a score were fitted on clean students of `signs` of three seeds.

The store is only read; what is distilled goes to $FORESHOT_HOME. An audit takes about 20 seconds
on one AVX2 core, a student 30: an hour in all. One JSON, claims/audit/student.json or `--out`,
written after every student; the same command goes on where it was interrupted, if source and
machine are the same.
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from measure import kept
from sklearn.metrics import roc_auc_score

from foreshot.attacks import Clean
from foreshot.audit.student import audit_student
from foreshot.audit.teacher import load_teacher
from foreshot.compute import Compute, compute
from foreshot.config import Config, load_config
from foreshot.data import ImageSet
from foreshot.errors import ForeshotError
from foreshot.files import read_json, write_json
from foreshot.progress import plain
from foreshot.record import environment
from foreshot.seeding import generator
from foreshot.stages import Stages
from foreshot.store import DONE, Artefact, Store, content_hash, home, source_digest

OUT = Path(__file__).parent / "audit" / "student.json"
DEVELOPMENT = {"signs": 0}
"""The seed whose students the audit was developed on, by preset."""
SOURCE = (
    *("audit/student.py", "audit/inversion.py", "audit/teacher.py", "attacks/folding.py"),
    *("compute.py", "inference.py", "levels.py", "models", "seeding.py"),
)
"""What the numbers depend on: a row of another source is measured anew."""
IMAGES = 500
BACKDOOR, NONE = 0.5, 0.05
"""ASR from which on a student has a backdoor, and up to which poison has come to nothing."""


@dataclass(frozen=True)
class Subject:
    """A student, and what is known of it.

    Args:
        file: its model.
        teacher: its teacher's.
        about: what its row says of it, the audit apart.
    """

    file: Path
    teacher: Path
    about: dict[str, Any]


def held(store: Path, trains: set[str]) -> Iterator[Subject]:
    """The students in a store that were distilled on one of some sets and evaluated, once each.

    Args:
        store: where `claims/map.py` or `claims/defences.py` left them.
        trains: digests of the sets.
    """
    files: dict[str, tuple[Path, dict[str, Any]]] = {}
    for stage in ("teacher", "poison", "student"):
        for path in sorted(store.glob(f"{stage}/*/{DONE}")):
            done = read_json(path)
            files[content_hash(done["digests"])] = path.parent, done["inputs"]
    known: set[Path] = set()
    for path in sorted(store.glob(f"evaluate/*/{DONE}")):
        inputs, rates = read_json(path)["inputs"], read_json(path.parent / "evaluation.json")
        if inputs["data"]["train"] not in trains:
            continue
        for name in ("student", "undefended", "clean"):
            digest = inputs["students"].get(name)
            if digest not in files or files[digest][0] in known:
                continue
            folder, made = files[digest]
            # Made by a screen, by a defence in distillation, or for screens to look at.
            if made.keys() & {"kept", "change", "beside"}:
                continue
            known.add(folder)
            attack = {"name": "clean"}
            if name != "clean":
                attack = files[inputs["poison"]][1]["attack"]
            poisoned = attack["name"] != "clean"
            yield Subject(
                folder / "model.safetensors",
                files[inputs["teacher"]][0] / "model.safetensors",
                {
                    "seed": made["seed"],
                    "trigger": inputs["trigger"]["name"] if poisoned else None,
                    "attack": attack["name"],
                    "rate": attack.get("rate") if poisoned else 0,
                    "epsilon": attack.get("epsilon") if poisoned else None,
                    "temperature": made["distillation"]["terms"][0]["loss"].get("temperature"),
                    "augment": made["network"]["training"]["augment"],
                    "target": inputs["target"] if poisoned else None,
                    "asr": rates[name]["asr"]["value"] if poisoned else None,
                    "clean_accuracy": rates[name]["clean_accuracy"]["value"],
                },
            )


def distilled(
    config: Config, seed: int, number: int, teacher: Path, store: Store, engine: Compute
) -> Subject:
    """One more clean student of a teacher: other weights at first, another order of images."""
    stages = Stages(config, store, engine, home() / "data", plain)
    done = read_json(teacher.parent / DONE)
    artefact = Artefact(teacher.parent, done["digests"], done["seconds"])
    tutor = stages.trained(artefact)
    student = stages.student(tutor, stages.poison(tutor, Clean()), f"clean {number} of {seed}")
    nothing = dict.fromkeys(("trigger", "epsilon", "target", "asr", "clean_accuracy"))
    about = {"seed": seed, "attack": "clean", "rate": 0, "augment": "none", "again": number}
    return Subject(student.path, teacher, {**nothing, **about, "temperature": 4.0})


def mixed(subjects: list[Subject]) -> list[Subject]:
    """The clean students and one of each trigger and seed first: an early end leaves a summary."""
    places: list[tuple[bool, int]] = []
    before: Counter[tuple[int, str | None]] = Counter()
    for subject in subjects:
        trigger = subject.about["trigger"]
        kind = subject.about["seed"], trigger
        places.append((trigger is not None and before[kind] > 0, before[kind]))
        before[kind] += 1
    order = sorted(range(len(subjects)), key=places.__getitem__)
    return [subjects[index] for index in order]


def trusted(test: ImageSet) -> ImageSet:
    """The clean images of the defender, without labels."""
    chosen = torch.randperm(len(test), generator=generator(0, "audit", "trusted"))[:IMAGES]
    return ImageSet(test.images[chosen], None, test.classes)


def row_of(subject: Subject, clean: ImageSet, engine: Compute, store: Store) -> dict[str, Any]:
    """What the audit says of a student, beside what is known of it."""
    student, teacher = (
        load_teacher(file, None, 0, engine).model for file in (subject.file, subject.teacher)
    )
    found = audit_student(student, teacher, clean, compute=engine, store=store)
    target = subject.about["target"]
    return {
        **subject.about,
        "score": round(found.score, 4),
        "p": float(f"{float(found.p.min()):.3g}"),
        "suspected": found.target,
        "right": None if target is None else found.target == target,
        "scores": [round(float(found.scores[c]), 4) for c in found.long],
        "levels": round(255 * float(found.changes.sizes[found.target]), 2),
        "success": [round(share, 3) for share in found.success[found.target].tolist()],
        "seconds": round(sum(found.seconds.values()), 2),
    }


def summary(rows: list[dict[str, Any]], alarm: float = 0.05) -> dict[str, Any]:
    """How well scores tell students with a backdoor from clean ones; by trigger, and weak ones."""

    def told(some: list[dict[str, Any]]) -> dict[str, Any]:
        scores = [row["score"] for row in (*clean, *some)]
        return {
            "students": len(some),
            "auroc": roc_auc_score([0] * len(clean) + [1] * len(some), scores),
            "found": sum(row["p"] <= alarm for row in some),
            "target_right": sum(row["right"] for row in some),
        }

    clean = [row for row in rows if row["attack"] == "clean"]
    poisoned = [row for row in rows if row["attack"] != "clean"]
    groups = {
        "backdoor": [row for row in poisoned if row["asr"] >= BACKDOOR],
        "weak": [row for row in poisoned if NONE < row["asr"] < BACKDOOR],
        "come to nothing": [row for row in poisoned if row["asr"] <= NONE],
    }
    for row in groups["backdoor"]:
        groups.setdefault(f"backdoor, {row['trigger']}", []).append(row)
    return {
        "clean": {"students": len(clean), "found": sum(row["p"] <= alarm for row in clean)},
        **{name: told(group) for name, group in groups.items() if clean and group},
    }


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="signs")
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--more", type=int, default=5, help="further clean students a seed")
    parser.add_argument("--store", type=Path, help="where claims/map.py left its students")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    try:
        engine, circumstances = compute(given.device), environment()
        own = Store.open(plain)

        def preset(seed: int) -> Config:
            return load_config(given.preset, [*given.settings, f"seed={seed}"])

        def stages(seed: int) -> Stages:
            return Stages(preset(seed), own, engine, home() / "data", plain)

        clean = trusted(stages(given.seeds[0]).data.test)
        same = {
            "schema": 1,
            "preset": given.preset,
            "set": given.settings,
            "images": IMAGES,
            "clean_images": clean.digest,
            "code": source_digest(*SOURCE),
            **engine.describe(),
            **{key: circumstances[key] for key in ("versions", "host")},
        }
        options = ["--preset", given.preset]
        options += [part for key in given.settings for part in ("--set", key)]
        about = same | {"command": f"python claims/audit_student.py {shlex.join(options)}"}
        about |= {"source": circumstances["source"]}
        rows = {row["student"]: row for row in kept(given.out, same)}
        # Where a defender's images are set aside, each seed has a transfer set of its own.
        trains = {stages(seed).data.train.digest for seed in given.seeds}
        found = list(held(given.store or home() / "store", trains))
        found = [subject for subject in found if subject.about["seed"] in given.seeds]
        teachers = {subject.about["seed"]: subject.teacher for subject in found}
        if not found:
            raise ForeshotError(
                f"{given.store or home()}: expected students, found none; see --help"
            )
        pairs = [(number, seed) for number in range(1, given.more + 1) for seed in teachers]
        found += [
            distilled(preset(100 * number + seed), seed, number, teachers[seed], own, engine)
            for number, seed in pairs
        ]
        for subject in mixed(found):
            name = subject.file.parent.name
            if name in rows:
                continue
            rows[name] = {"student": name, **row_of(subject, clean, engine, own)}
            row = rows[name]
            print({k: row[k] for k in ("seed", "trigger", "attack", "asr", "score", "p", "right")})
            known = DEVELOPMENT.get(given.preset)
            others = [row for row in rows.values() if row["seed"] != known]
            date = datetime.now(UTC).date().isoformat()
            figures = {"date": date, "summary": summary(others), "runs": list(rows.values())}
            write_json(given.out, about | figures)
    except ForeshotError as error:
        print(f"audit_student: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
