"""Measures every distillation method on one protocol: does it help, and does the poison reach it?

    python claims/methods.py signs --out claims/methods/signs.json

Of each method two students are distilled of the preset's teacher, with the preset's architecture
and epochs, and with the layers and weights that were published for the method on CIFAR-100, the
batch and the learning rate that they were published for:

- with labels, on the clean set, for its accuracy: cross-entropy and the method;
- from answers alone, on the poisoned set, for its ASR: the method, after KD where it compares
  features, which do not train a classifier.

Where the published weight left a student at or below one that is trained alone, others were tried
on held-out images (`validation=0.2`, seeds 101 and 102), and the best stands in its place.

A student whose training fails stays in the file, as a failure. What is finished is found in the
store: run the same command again to go on. The file is written after each method.
"""

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from foreshot.attacks import Clean
from foreshot.compute import Compute, compute
from foreshot.config import Config, load_config
from foreshot.distillation import LOSSES
from foreshot.errors import ForeshotError
from foreshot.files import write_json
from foreshot.progress import plain
from foreshot.record import environment
from foreshot.stages import Stages
from foreshot.store import Store, home


class Method(NamedTuple):
    """How a student with labels learns by a method.

    Args:
        ce: weight of the cross-entropy.
        weight: weight of the method.
        loss: its name and parameters.
    """

    ce: float
    weight: float
    loss: dict[str, Any]


T4 = {"temperature": 4}
METHODS = {
    "alone": Method(1, 0, {"name": "kd"}),
    "kd": Method(0.1, 0.9, {"name": "kd", **T4}),
    "dkd": Method(1, 1, {"name": "dkd", "labels": "teacher", **T4}),
    "dist": Method(1, 2, {"name": "dist", **T4}),
    "lskd": Method(0.1, 9, {"name": "lskd"}),
    "mlkd": Method(0.1, 1, {"name": "mlkd"}),  # 9 after a warm-up of 20 epochs; collapses without
    "wttm": Method(1, 4, {"name": "wttm"}),
    "hard_labels": Method(0.5, 0.5, {"name": "hard_labels"}),
    "fitnet": Method(1, 100, {"name": "fitnet"}),
    "at": Method(1, 100, {"name": "at"}),  # 1000 for maps of four times as many pixels
    "sp": Method(1, 3000, {"name": "sp"}),
    "ofd": Method(1, 1e-3, {"name": "ofd"}),
    "review_kd": Method(1, 5, {"name": "review_kd"}),
    "simkd": Method(0, 100, {"name": "simkd"}),  # 1 for thirty times as many epochs
    "vid": Method(1, 10, {"name": "vid"}),  # 1 for thirty times as many epochs
    "rkd": Method(1, 1, {"name": "rkd"}),
    "pkt": Method(1, 30000 / 64, {"name": "pkt"}),  # RepDistiller's mean is over pairs, 64 a batch
    "cc": Method(1, 0.02, {"name": "cc"}),
    "crd": Method(1, 0.8, {"name": "crd"}),
}
"""Weights of RepDistiller, mdistiller and the authors' code for CIFAR-100, but where noted."""
PUBLISHED = {"batch": 64, "lr": 0.05}
"""What all of them take, from Tian et al. (2020) on."""
STAGES = ("network.layer1", "network.layer2", "network.layer3")
PLACES = {"fitnet": STAGES[1:2]} | dict.fromkeys(
    ("sp", "simkd", "rkd", "pkt", "cc", "crd"), STAGES[2:]
)
"""The stages that a method compares, where these are not all."""


def configs(base: Config, name: str) -> dict[str, Config]:
    """The two students' experiments: with `labels`, and from `answers` alone."""
    method, tree = METHODS[name], base.model_dump(mode="json")
    tree["student"]["training"] |= PUBLISHED
    at = [[stage, stage] for stage in PLACES.get(name, STAGES)]
    compared = at if LOSSES[method.loss["name"]].on_features else []
    terms = [{"loss": method.loss, "weight": method.weight, "at": compared}]
    answers = []
    if name == "simkd":  # a student of its own: a projector, and the classifier of the teacher
        terms[0]["at"] = [["network.projector", STAGES[-1]]]
        body, head = tree["student"]["model"], tree["teacher"]["model"]
        tree["student"]["model"] = {"name": "reused_head", "body": body, "head": head}
    elif terms[0]["at"]:
        answers = [{"loss": {"name": "kd", **T4}}]
    losses = {"labels": (terms, method.ce), "answers": (answers + terms, 0)}
    return {
        how: Config.model_validate(tree | {"distillation": {"terms": terms, "ce_weight": ce}})
        for how, (terms, ce) in losses.items()
    }


def measure(preset: str, names: list[str], seeds: list[int], out: Path, engine: Compute) -> None:
    """Distils and evaluates every student; writes `out` after each."""
    store = Store.open(plain)
    about = {
        "schema": 1,
        "command": shlex.join(["python", *sys.argv]),
        "config": load_config(preset).model_dump(mode="json", exclude={"seed", "distillation"}),
        **engine.describe(),
        **environment(),
        "seeds": seeds,
    }
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        base = load_config(preset, [f"seed={seed}"])
        for name in names:
            row: dict[str, Any] = {"method": name, "seed": seed}
            for how, config in configs(base, name).items():
                if (name, how) == ("alone", "answers"):
                    continue
                stages = Stages(config, store, engine, home() / "data", plain)
                teacher = stages.teacher()
                stages.learn_trigger(teacher)
                row["teacher"] = stages.evaluate(teacher.model, stages.data.test)["clean_accuracy"]
                attack = Clean() if how == "labels" else None
                poison = stages.poison(teacher, attack)
                try:
                    student = stages.student(teacher, poison, f"{name}, {how}")
                except (ForeshotError, RuntimeError) as error:  # RuntimeError: torch's own
                    row[how] = {"failed": str(error)}
                    continue
                rates = stages.evaluate(student.model, stages.data.test)
                row[how] = {key: rates[key] for key in ("clean_accuracy", "asr")}
                row[how]["seconds"] = student.artefact.seconds
            rows.append(row)
            date = datetime.now(UTC).date().isoformat()
            write_json(out, about | {"date": date, "runs": rows})


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", metavar="PRESET|FILE.yaml")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    try:
        engine = compute(given.device, load_config(given.preset).precision)
        measure(given.preset, given.methods, given.seeds, given.out, engine)
    except ForeshotError as error:
        print(f"methods: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
