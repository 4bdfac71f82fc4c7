"""What an audit leaves: a ranking, a verdict, a gallery, and the subset that is kept."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from foreshot.audit.data import Audit
from foreshot.audit.folder import COLOURS, VERDICT, told, written
from foreshot.audit.reading import LEFT_OUT, Found, content_of
from foreshot.data.base import ImageSet
from foreshot.data.tensor import read
from foreshot.defences.screens import TeacherConsistency
from foreshot.errors import ForeshotError, printable
from foreshot.files import (
    PART,
    abandoned,
    naming,
    sync_folder,
    write_bytes,
    write_json,
    write_parquet,
    write_tensors,
)
from foreshot.models.checkpoint import network_digest
from foreshot.progress import silent
from foreshot.record import environment
from foreshot.report.page import data_uri, named, render
from foreshot.tables import console

SHOWN = 48
"""Images in the gallery."""
LISTED = 10
"""Files in the terminal."""
WANTED = 0.01
"""Share of poison that a clean set should be able to reveal."""


class Report:
    """An audit of pictures with names, to be written and printed.

    Args:
        audit: what was found out.
        found: what was read.
        skipped: what was not, of the set and of the clean images, and why.
        folder: to write to.
        paths: where set, teacher and the rest come from, by what they are.
    """

    def __init__(
        self,
        audit: Audit,
        found: Found,
        skipped: dict[str, str],
        folder: Path,
        paths: Mapping[str, Path],
    ) -> None:
        self.audit, self.found, self.skipped, self.folder = audit, found, skipped, folder
        self.paths, self.date = paths, datetime.now(UTC)
        self.notes: list[str] = []

    def write(self) -> None:
        """Writes all files, the verdict last; parquet only if there is a package for it."""
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_bytes(self.folder / "ranked.jsonl", lines.encode())
        rows = [{**row, "name": printable(row["name"])} for row in self.rows]
        try:
            write_parquet(self.folder / "ranked.parquet", rows)
        except ForeshotError as error:
            self.notes.append(f"{error}; ranked.jsonl holds the same.")
        write_bytes(self.folder / "report.html", self.html().encode())
        write_json(self.folder / VERDICT, self.summary())

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The images, the most suspicious first."""
        audit, order = self.audit, self.audit.rank
        columns = {
            "name": [self.found.names[index] for index in order],
            "index": order.tolist(),
            "p": audit.p[order].tolist(),
            "left_out": audit.left_out[order].tolist(),
            "suspected_target": [self._class(said) for said in audit.said[order].tolist()],
            "confidence": audit.confidence[order].tolist(),
            **{f"score_{k}": scores.transfer[order].tolist() for k, scores in audit.scores.items()},
        }
        rows = zip(*columns.values(), strict=True)
        return [
            {"rank": rank, **dict(zip(columns, row, strict=True))}
            for rank, row in enumerate(rows, 1)
        ]

    def summary(self) -> dict[str, Any]:
        """What `verdict.json` holds."""
        audit, view = self.audit, self.audit.view
        return {
            "schema": 1,
            "verdict": audit.verdict,
            **written(self.paths, self.date),
            "calibrated": audit.calibrated,
            "distilled": view.student is not None,
            "sentences": self.sentences(),
            "p": audit.set_p,
            "alarm": audit.alarm,
            "smallest_share": audit.smallest,
            "suspected_target": None if audit.target is None else self._class(audit.target),
            "images": len(view.transfer),
            "clean_images": 0 if view.clean is None else len(view.clean),
            "drop": audit.drop,
            "left_out": int(audit.left_out.sum()),
            "images_per_second": {name: round(audit.speed(name), 1) for name in audit.seconds},
            "skipped": self.skipped,
            "inputs": {
                "set": view.transfer.digest,
                "clean": None if view.clean is None else view.clean.digest,
                "teacher": network_digest(view.teacher),
                "second": None if view.second is None else network_digest(view.second),
            },
            "screens": {
                name: screen.model_dump(mode="json") for name, screen in audit.screens.items()
            },
            "seed": view.seed,
            **view.compute.describe(),
            **environment(),
        }

    def sentences(self) -> list[str]:
        """The verdict, the first of them, and what it is worth."""
        audit = self.audit
        against = "this clean set" if audit.calibrated else "the set's own bulk"
        verdict = {
            "clean": f"CLEAN: nothing was found that tells the set from {against}",
            "suspicious": f"SUSPICIOUS: the set differs from {against} as a poisoned set does",
            "none": "NO VERDICT: so few images cannot tell a poisoned set from a clean one",
        }[audit.verdict]
        said = [f"{verdict} (p = {audit.set_p:.2g})."]
        unread = len(self.found.skipped)
        if unread:
            said.append(
                f"WARNING: {unread:,} of {unread + len(audit.p):,} files of the set were not read: "
                "nothing is said of them."
            )
        if audit.calibrated:
            said.append(
                f"Of sets without poison, at most {100 * audit.alarm:g}% are called suspicious, if "
                "the clean images are drawn as those of the set were."
            )
            said.append(self._power())
        else:
            said.append(
                "UNCALIBRATED: without clean images to compare with (--clean), how high clean "
                "images score is a guess, and no rate of false alarms is promised."
            )
        if audit.target is not None:
            left = audit.left_out
            among = float((audit.said[left] == audit.target).double().mean())
            usual = float((audit.said == audit.target).double().mean())
            said.append(
                f"Suspected target: {named(self._class(audit.target))}, which the teacher "
                f"says of {among:.0%} of the {int(left.sum()):,} most suspicious images and of "
                f"{usual:.0%} of all."
            )
        elif audit.suspicious:
            said.append(
                "WARNING: no single image stands out enough to be left out (--drop). Do not distil "
                "on the set; with more clean images, images can be told apart."
            )
        return said

    def _power(self) -> str:
        audit = self.audit
        assert audit.view.clean is not None
        count = f"{len(audit.view.clean):,} clean images"
        if audit.smallest is None:
            size = f"a set of {len(audit.p):,}"
            return f"WARNING: with {count} and {size}, no share of poison can be found. Take more."
        text = (
            f"ith {count}, poison is sure to be found from {audit.smallest:.2%} of the set on, "
            "if a screen ranks all of it first; less takes luck."
        )
        return f"WARNING: w{text} Take more." if audit.smallest > WANTED else f"W{text}"

    def print(self) -> None:
        """Prints the verdict, what each screen costs, and the most suspicious files."""
        audit = self.audit
        first, *rest = self.sentences()
        console.print(Text(first, COLOURS[audit.verdict]))
        for sentence in [*rest, *self.notes]:
            console.print(Text(sentence))
        if self.skipped:
            console.print(Text(f"{len(self.skipped):,} files were not read:", "bold"))
            for name, reason in list(self.skipped.items())[:LISTED]:
                console.print(Text(f"  {named(name)}: {printable(reason)}"))
            if len(self.skipped) > LISTED:
                console.print(Text("  ... (all are in verdict.json)"))
        console.print(Text(f"Asked about {self._asked()}:"))
        costs = Table("who", "images/s")
        costs.columns[1].justify = "right"
        for name in audit.seconds:
            costs.add_row(Text(name), f"{audit.speed(name):,.0f}")
        console.print(costs)
        top = Table("file", "p", "the teacher says", title="The most suspicious")
        for row in self.rows[:LISTED]:
            said = f"{named(row['suspected_target'])} ({row['confidence']:.0%})"
            top.add_row(Text(named(row["name"])), f"{row['p']:.2g}", Text(said))
        console.print(top)
        console.print(
            Text(f"Look at {self.folder / 'report.html'}; every image is in ranked.jsonl.")
        )

    def _asked(self) -> str:
        clean = self.audit.view.clean
        beside = "" if clean is None else f" and {len(clean):,} clean ones"
        return f"{len(self.audit.p):,} images{beside}"

    def html(self) -> str:
        """The gallery, one file that asks nothing of the net."""
        return render(
            "foreshot.audit",
            "report.html.j2",
            first=self.sentences()[0],
            sentences=self.sentences()[1:],
            verdict=self.audit.verdict,
            about={**told(self.paths, self.date), "images": self._asked()},
            cards=self._cards(),
            skipped=[(named(k), printable(v)) for k, v in list(self.skipped.items())[:SHOWN]],
            unread=len(self.skipped),
            speeds=[(name, f"{self.audit.speed(name):,.0f}") for name in self.audit.seconds],
        )

    def _cards(self) -> list[dict[str, Any]]:
        audit = self.audit
        top = audit.rank[:SHOWN]
        images = audit.view.transfer.images[top]
        places = {
            name: scores.transfer.argsort(descending=True).argsort()[top] + 1
            for name, scores in audit.scores.items()
        }
        changes = self._changed(audit.view.transfer.select(top))
        return [
            {
                "name": named(row["name"]),
                "picture": data_uri(images[number]),
                "p": f"{row['p']:.2g}",
                "left_out": row["left_out"],
                "before": f"{named(row['suspected_target'])} {row['confidence']:.0%}",
                "after": [
                    (
                        change,
                        f"{named(self._class(int(said[number])))} {float(share[number]):.0%}",
                        bool(said[number] != audit.said[top[number]]),
                    )
                    for change, (share, said) in changes.items()
                ],
                "places": [(name, f"{int(place[number]):,}") for name, place in places.items()],
            }
            for number, row in enumerate(self.rows[:SHOWN])
        ]

    def _changed(self, images: ImageSet) -> dict[str, tuple[Tensor, Tensor]]:
        """How sure the teacher is of what, once images are changed as the screens do it."""
        pool = replace(self.audit.view, transfer=images, clean=None, listener=silent).pool
        screen, found = TeacherConsistency(), {}
        for change in screen.changes:
            logits = pool.asked(pool.view.teacher, lambda x, c=change: screen.changed(x, c, pool))
            found[change] = logits.softmax(1).max(1)
        return found

    def _class(self, number: int) -> str:
        return self.audit.view.transfer.classes[number]

    # The kept subset -----------------------------------------------------------------------------

    def write_clean(self, source: Path, folder: Path) -> None:
        """Writes what is kept of the set, and `left-out.jsonl`; all of it or nothing.

        Nothing of a set of which nobody knows that it is clean, or which images make it suspicious.
        """
        audit, out = self.audit, int(self.audit.left_out.sum())
        if not audit.conclusive or (audit.suspicious and not out):
            self.notes.append(f"{folder} was not written: it could hold poison.")
            return
        self._write_clean(source, folder.resolve())
        self.notes.append(
            f"Kept {len(audit.p) - out:,} of {len(audit.p):,} images in {folder}; {LEFT_OUT} "
            f"there lists {out:,} suspicious images and {len(self.found.skipped):,} unread files."
        )

    def _write_clean(self, source: Path, folder: Path) -> None:
        audit = self.audit
        part = folder.with_name(f".{folder.name}.{os.getpid()}{PART}")
        for left in folder.parent.glob(f".{escape(folder.name)}.*{PART}"):
            if left == part or abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            kept = (~audit.left_out).nonzero()[:, 0]
            if source.is_dir():
                for index in kept.tolist():
                    name = self.found.names[index]
                    content = content_of(source / name, source)
                    if sha256(content).digest() != self.found.digests[index]:
                        raise _rewritten(source / name)
                    target = part / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with naming(target):
                        target.write_bytes(content)
            else:
                images, labels, classes = read(source)
                screened = self.found.images
                same_shape = images.shape == screened.images.shape
                if not (same_shape and replace(screened, images=images).digest == screened.digest):
                    raise _rewritten(source)
                tensors = {"images": images[kept]}
                if labels is not None:
                    tensors["labels"] = labels[kept]
                write_tensors(part / source.name, tensors, {"classes": classes})
            out = [{"name": row["name"], "p": row["p"]} for row in self.rows if row["left_out"]]
            out += [{"name": name, "reason": reason} for name, reason in self.found.skipped.items()]
            lines = "".join(json.dumps(row) + "\n" for row in out)
            write_bytes(part / LEFT_OUT, lines.encode())
            os.sync()  # once for all of the pictures
            part.replace(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _rewritten(path: Path) -> ForeshotError:
    return ForeshotError(printable(f"{path}: expected what was screened, found it changed"))
