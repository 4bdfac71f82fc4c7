"""The engineer's door: is this set poisoned, as far as screens can tell?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn

from foreshot.audit import distilled
from foreshot.audit.distilled import STUDENT
from foreshot.audit.verdict import set_test
from foreshot.compute import CPU, Compute
from foreshot.data.base import ImageSet
from foreshot.defences import SCREENING, Scores, Screen
from foreshot.defences.combined import DEFAULT, combined, usable
from foreshot.defences.conformal import (
    DROP,
    benjamini_hochberg,
    enriched,
    exponential_tails,
    p_values,
)
from foreshot.errors import ForeshotError
from foreshot.files import read_tensors, write_tensors
from foreshot.inference import place
from foreshot.models.checkpoint import load_model, network_digest
from foreshot.progress import Event, Listener, silent
from foreshot.store import Store, source_digest, versions
from foreshot.views import DefenderView

TEACHER = "teacher"


@dataclass(frozen=True, eq=False)
class Audit:
    """What is found out about a set.

    Args:
        view: what was known.
        screens: what was asked, by name.
        scores: of each screen.
        seconds: that each screen, the teacher's answers, and a student if there is one, took when
            they were computed.
        said: the teacher's answers to the set, int64 (N,).
        confidence: its softmax there, float32 (N,).
        rank: the images, the most suspicious first, int64 (N,).
        p: p-values of the images, float64 (N,).
        alarm: at most this share of clean sets is called suspicious.
        drop: images of a suspicious set with p-values of this or less are left out of the clean
            subset; so is, in expectation, at most this share of its clean images. Without clean
            images to calibrate them it is of no effect: what is left out then is what Benjamini and
            Hochberg's procedure flags at the level `alarm`.
        set_p: p-value of the set.
        smallest: the smallest share of poison that the clean images could reveal; None if none.
    """

    view: DefenderView
    screens: Mapping[str, Screen]
    scores: Mapping[str, Scores]
    seconds: Mapping[str, float]
    said: Tensor
    confidence: Tensor
    rank: Tensor
    p: Tensor
    alarm: float
    drop: float
    set_p: float
    smallest: float | None

    @property
    def calibrated(self) -> bool:
        """Whether there were clean images to compare with; if not, p-values are guesses."""
        return self.view.clean is not None

    @property
    def conclusive(self) -> bool:
        """Whether there is a verdict: poison was found, or could have been."""
        tail = len(self.p) * self.alarm >= 1  # of an image at least
        return self.suspicious or (self.smallest is not None if self.calibrated else tail)

    @property
    def verdict(self) -> Literal["clean", "suspicious", "none"]:
        """What is said of the set."""
        if not self.conclusive:
            return "none"
        return "suspicious" if self.suspicious else "clean"

    @property
    def suspicious(self) -> bool:
        """Whether the set looks poisoned."""
        return self.set_p <= self.alarm

    @cached_property
    def left_out(self) -> Tensor:
        """Whether an image is left out of the clean subset, bool (N,)."""
        if self.calibrated:
            return (self.p <= self.drop) & self.suspicious
        # A guess that is wrong for many clean images would leave them all out.
        flagged = benjamini_hochberg(self.p, self.alarm)
        return torch.zeros(len(self.p), dtype=torch.bool).index_fill(0, flagged, True)

    @cached_property
    def target(self) -> int | None:
        """The class that is most over-represented among what is left out; None if nothing is."""
        return enriched(self.said, self.left_out.nonzero()[:, 0])

    def speed(self, name: str) -> float:
        """Images a second of a screen, or of the teacher."""
        return len(self.view.pool) / max(self.seconds[name], 1e-9)


def audit(
    transfer: ImageSet,
    teacher: nn.Module,
    *,
    clean: ImageSet | None = None,
    second: nn.Module | None = None,
    screens: Sequence[Screen] | None = None,
    distil: bool = False,
    alarm: float = 0.05,
    drop: float = DROP,
    seed: int = 0,
    compute: Compute = CPU,
    store: Store | None = None,
    listener: Listener = silent,
) -> Audit:
    """Screens a transfer set with the teacher that will label it.

    The verdict is that of `verdict.set_test`, the images' p-values are those of the screen
    `combined`. Without clean images both are guesses: the smallest tail of any screen
    (`conformal.exponential_tails`), times their number, and Simes' test of these.

    Args:
        transfer: the set; its labels are looked at if it has any, and so has the clean set.
        teacher: float (n, C, H, W) in [0, 1] -> logits (n, K).
        clean: images that are known to be clean, of the same kind as the set, and to the teacher
            what the set is: seen in its training, or not.
        second: another teacher for the same classes, trained apart from the first.
        screens: which; None for those of the screen `combined` that have what they need.
        distil: whether to distil a small student on the set, for screens that look at one. It
            takes the memory of the set.
        alarm: at most this share of clean sets is called suspicious; from 0.001 on.
        drop: p-value up to which images of a suspicious set are left out of the clean subset.
        seed: of the screens' random numbers.
        compute: where the networks are.
        store: where the scores of finished screens are kept and found; None keeps nothing. A
            network of the user's own is told from others by what prints of it and by its state.
        listener: hears of the progress.

    Raises:
        ForeshotError: a screen lacks what it needs, or is there twice, or a network answers with
            what is no number.
    """
    stage = [TEACHER]
    view = DefenderView(
        transfer=transfer,
        teacher=teacher,
        student=None,
        clean=clean,
        seed=seed,
        compute=compute,
        listener=lambda event: listener(replace(event, stage=stage[-1])),
        second=second,
    )
    inputs = {} if store is None else _inputs(view)
    seconds: dict[str, float] = {}

    def computed(name: str, screen: Screen | None) -> dict[str, Tensor]:
        stage.append(name)
        listener(Event(name, "start", total=len(view.pool)))
        if store is None:
            found, seconds[name] = _computed(view, screen)
        else:
            wanted = {**inputs, "screen": screen and screen.model_dump(mode="json")}
            looks = screen is not None and "student" in screen.uses(view.pool.lacks)
            if looks and view.student is not None:
                wanted["student"] = network_digest(view.student)
            kept = store.stage(f"audit-{name}", wanted, lambda to: _write(to, view, screen), name)
            found, about = read_tensors(kept.folder / FILE)
            seconds[name] = about["seconds"]
        speed = len(view.pool) / max(seconds[name], 1e-9)
        listener(Event(name, "end", values={"images/s": speed}))
        return found

    lacks = view.pool.lacks - ({"student"} if distil else set())
    chosen = screens or usable(DEFAULT, lacks)
    for screen in chosen:
        screen.check(lacks)
    names = {screen.title: screen for screen in chosen}
    if len(names) < len(chosen):
        raise ForeshotError(
            f"screens: expected each once, found {', '.join(screen.title for screen in chosen)}"
        )
    if distil and not any("student" in screen.uses(lacks) for screen in chosen):
        raise ForeshotError(
            f"distil: expected a screen that looks at a student, such as scan, which needs clean "
            f"images as well; found {', '.join(names)}"
        )
    answers = computed(TEACHER, None)
    if distil:
        stage.append(STUDENT)
        learned, seconds[STUDENT] = _student(view, store, inputs)
        view = view.looked_at(place(learned, compute))
    scores = {name: Scores(**computed(name, screen)) for name, screen in names.items()}
    suspicion, p, set_p, smallest = _judged(list(scores.values()), alarm, seed)
    return Audit(
        view=view,
        screens=names,
        scores=scores,
        seconds=seconds,
        said=answers["said"],
        confidence=answers["confidence"],
        rank=suspicion.argsort(descending=True, stable=True),
        p=p,
        alarm=alarm,
        drop=drop,
        set_p=set_p,
        smallest=smallest,
    )


def _judged(
    screens: list[Scores], alarm: float, seed: int
) -> tuple[Tensor, Tensor, float, float | None]:
    """Suspicion and p-values of the images, p-value of the set, smallest share to be found."""
    count = len(screens[0].transfer)
    pools = [torch.cat([scores.transfer, scores.clean]) for scores in screens]
    clean = len(pools[0]) - count
    if clean:
        scores = Scores(*combined(pools, clean).split([count, clean]))
        found = set_test(screens, alarm, seed)
        return scores.transfer, p_values(scores), found.p, found.smallest
    least = torch.stack([exponential_tails(pool) for pool in pools]).amin(0)
    p = (len(pools) * least).clamp(max=1)
    simes = p.sort().values * count / torch.arange(1, count + 1)
    return -least, p, float(simes.min()), None


# What is kept ------------------------------------------------------------------------------------

FILE = "scores.safetensors"


def _inputs(view: DefenderView) -> dict[str, object]:
    """Everything that scores depend on beside the screen."""
    return {
        "transfer": view.transfer.digest,
        "clean": None if view.clean is None else view.clean.digest,
        "teacher": network_digest(view.teacher),
        "second": None if view.second is None else network_digest(view.second),
        "seed": view.seed,
        "compute": view.compute.describe(),
        "source": source_digest("audit/data.py", "attacks/folding.py", *SCREENING),
        "versions": versions(),
    }


def _student(
    view: DefenderView, store: Store | None, inputs: Mapping[str, object]
) -> tuple[nn.Module, float]:
    """A student of the set, and the seconds that it took."""
    if store is None:
        with TemporaryDirectory() as folder:
            began = perf_counter()
            distilled.distil(view, Path(folder))
            return load_model(Path(folder) / distilled.FILE).model, perf_counter() - began
    own = {key: value for key, value in inputs.items() if key != "second"}
    own["source"] = source_digest(*distilled.SOURCES, *SCREENING)
    kept = store.stage(f"audit-{STUDENT}", own, partial(distilled.distil, view), STUDENT)
    return load_model(kept.folder / distilled.FILE).model, kept.seconds


def _write(folder: Path, view: DefenderView, screen: Screen | None) -> None:
    found, seconds = _computed(view, screen)
    write_tensors(folder / FILE, found, {"seconds": seconds})


def _computed(view: DefenderView, screen: Screen | None) -> tuple[dict[str, Tensor], float]:
    """The scores of a screen, or the teacher's answers, and the seconds that it took."""
    if screen is not None:
        _ = view.pool.teacher  # asked once for all screens, and counted for none of them
    began = perf_counter()
    if screen is None:
        shares = view.pool.teacher.logits[: len(view.transfer)].softmax(1)
        confidence, said = shares.max(1)
        found = {"said": said, "confidence": confidence}
    else:
        scores = screen.score(view)
        found = {"transfer": scores.transfer, "clean": scores.clean}
    return found, perf_counter() - began
