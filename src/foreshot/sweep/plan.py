"""What a sweep has to compute: in which order, what cells share, and about how long it takes."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from foreshot.config import Config, parse
from foreshot.errors import ForeshotError
from foreshot.files import read_json
from foreshot.store import DONE, content_hash
from foreshot.sweep.definition import Cell
from foreshot.sweep.folder import finished

Step = tuple[str, str]
"""A kind of stage, and a hash of the settings that it follows from."""
CONTROL = "control: "
_LESSON = ("student", "compression", "distillation")


def steps(config: Config, seed: bool = True) -> tuple[Step, ...]:
    """The larger stages of a run: cells with the same step compute it once.

    A step that is told apart here may still turn out the same in the store; never the other way
    round.

    Args:
        config: of the run.
        seed: whether the seed counts.
    """
    tree = config.model_dump(mode="json", exclude=set() if seed else {"seed"})
    controls = tree.pop("controls")
    defender, defence = tree.pop("defender"), tree.pop("defence")
    defended = None if defence is None else {"defence": defence, "defender": defender}
    # The images that the defender and the attacker's own teacher have are not the others'.
    owned = {"clean": 0 if defence is None else defender["clean"]}
    disjoint = config.surrogate is not None and config.surrogate.data == "disjoint"
    teacher = {key: tree.get(key) for key in ("seed", "precision", "data", "validation", "teacher")}
    teacher |= {"disjoint": disjoint}
    lesson = {key: tree.pop(key) for key in _LESSON} | {"defended": defended}
    craft = tree | owned
    found = {"teacher": teacher, "poison": craft, "student": craft | lesson}
    for name in controls:
        # A student that no attack touches is the same whatever the attack.
        about = teacher if name == "clean" else {"control": name, **craft}
        found[CONTROL + name] = about | owned | lesson
    found["evaluation"] = {**found["student"], "controls": controls}
    return tuple((kind, content_hash([kind, about])) for kind, about in found.items())


def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """The cells so that neighbours share as little as can be: workers side by side seldom wait.

    The first cells have different teachers, if there are any; of one teacher, different poison.
    """
    of = {cell.name: steps(cell.config) for cell in cells}
    for shared in (1, 0):
        turns: defaultdict[Step, count[int]] = defaultdict(count)
        turn = {cell.name: next(turns[of[cell.name][shared]]) for cell in cells}
        cells = sorted(cells, key=lambda cell: turn[cell.name])
    return list(cells)


class Evidence:
    """What finished runs and the store tell of stages.

    Args:
        runs: folders; those that are no finished runs are passed over.
        store: where finished stages are.
        engine: device, precision and threads of the sweep; runs with others tell nothing. What is
            None there is not compared.
    """

    def __init__(self, runs: Iterable[Path], store: Path, engine: dict[str, Any]) -> None:
        stored = _digests(store)
        self.there: set[Step] = set()
        self._like: defaultdict[Step, list[float]] = defaultdict(list)
        self._kind: defaultdict[str, list[float]] = defaultdict(list)
        for folder in runs:
            if not finished(folder):
                continue
            try:
                config = parse((folder / "config.yaml").read_text(encoding="utf-8"), str(folder))
                manifest = read_json(folder / "manifest.json")
                seconds = read_json(folder / "metrics.json")["seconds"]
                outputs, took = dict(manifest["outputs"]), _took(seconds, len(config.controls))
            except (ForeshotError, OSError, UnicodeDecodeError, LookupError, TypeError, ValueError):
                continue
            if any(manifest.get(key) != value for key, value in engine.items() if value):
                continue
            for step, like in zip(steps(config), steps(config, seed=False), strict=True):
                kind = step[0].partition(":")[0]
                self._like[like].append(took[kind])
                self._kind[kind].append(took[kind])
                if outputs.get(_file(step[0])) in stored:
                    self.there.add(step)

    def seconds(self, like: Step) -> float | None:
        """Median seconds of such a stage; of any of its kind if there is none; None if unknown."""
        known = self._like.get(like) or self._kind.get(like[0].partition(":")[0])
        return median(known) if known else None


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Args:
        cells: all of the sweep, in order.
        done: names of those whose run folder is complete.
        failed: names of those that failed before.
        retry: whether these are run again.
        evidence: what is known of stages.
    """

    cells: Sequence[Cell]
    done: frozenset[str]
    failed: frozenset[str]
    retry: bool
    evidence: Evidence

    @cached_property
    def todo(self) -> list[Cell]:
        """The cells to run, in the order in which they are started."""
        over = self.done if self.retry else self.done | self.failed
        return ordered([cell for cell in self.cells if cell.name not in over])

    @cached_property
    def uses(self) -> dict[str, Counter[Step]]:
        """For each kind of stage, how many of the cells to run use each."""
        found: dict[str, Counter[Step]] = {}
        for cell in self.todo:
            for step in steps(cell.config):
                found.setdefault(step[0], Counter())[step] += 1
        return found

    @cached_property
    def seconds(self) -> float | None:
        """About how long the computing takes in all; None if something is unknown."""
        left: dict[Step, Step] = {}
        for cell in self.todo:
            left |= zip(steps(cell.config), steps(cell.config, seed=False), strict=True)
        known = [self.evidence.seconds(like) for step, like in left.items()
                 if step not in self.evidence.there]  # fmt: skip
        return None if None in known else sum(seconds or 0 for seconds in known)


def _took(seconds: dict[str, float], controls: int) -> dict[str, float]:
    """Seconds of each kind of step, of those in `metrics.json`; all that is left is the student."""
    apart = {"teacher": "teacher", "poison": "poison", "evaluation": "evaluate"}
    took = {kind: seconds[key] for kind, key in apart.items()}
    took["student"] = seconds["total"] - sum(took.values()) - seconds["controls"]
    return took | {"control": seconds["controls"] / max(1, controls)}


def _file(kind: str) -> str:
    """What a step leaves in the run folder."""
    control = kind.removeprefix(CONTROL)
    return f"{kind if control == kind else f'controls/{control}'}.safetensors"


def _digests(store: Path) -> set[str]:
    """Digests of all files of finished stages."""
    found: set[str] = set()
    for done in store.glob(f"*/*/{DONE}"):
        with suppress(ForeshotError, KeyError):  # one that is just being replaced
            found |= set(read_json(done)["digests"].values())
    return found
