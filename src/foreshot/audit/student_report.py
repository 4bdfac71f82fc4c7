"""What the audit of a student leaves: a verdict, the changes, and a gallery of them."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from foreshot.audit.folder import COLOURS, VERDICT, told, written
from foreshot.audit.student import FITTED, PARTS, StudentAudit
from foreshot.files import write_bytes, write_json, write_tensors
from foreshot.levels import to_float, to_uint8
from foreshot.models.checkpoint import network_digest
from foreshot.record import environment
from foreshot.report.page import data_uri, named, render
from foreshot.tables import console

SHOWN = 48
"""Classes in the gallery."""
LISTED = 10
"""Classes in the terminal."""


class StudentReport:
    """An audit of a student, to be written and printed.

    Args:
        audit: what was found out.
        skipped: which pictures were not read, and why.
        folder: to write to.
        paths: where student, teacher and clean images come from, by what they are.
    """

    def __init__(
        self,
        audit: StudentAudit,
        skipped: dict[str, str],
        folder: Path,
        paths: Mapping[str, Path],
    ) -> None:
        self.audit, self.skipped, self.folder = audit, skipped, folder
        self.paths, self.date = paths, datetime.now(UTC)

    def write(self) -> None:
        """Writes all files, the verdict last."""
        changes = self.audit.changes
        tensors = dict(zip(PARTS, changes.parts, strict=True))
        about = {"classes": list(self.audit.clean.classes)}
        write_tensors(self.folder / "changes.safetensors", tensors, about)
        write_bytes(self.folder / "report.html", self.html().encode())
        write_json(self.folder / VERDICT, self.summary())

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The classes, the most suspicious first."""
        audit, long = self.audit, self.audit.long.tolist()
        rest = [c for c in audit.changes.sizes.argsort(stable=True).tolist() if c not in long]
        names = ("student", "teacher", "student_alone")
        return [
            {
                "class": audit.clean.classes[number],
                "index": number,
                "size_255": 255 * float(audit.changes.sizes[number]),
                "teacher_size_255": 255 * float(audit.usual[number]),
                "times_smaller": math.exp(float(audit.scores[number])) if number in long else None,
                "p": float(audit.p[number]) if number in long else None,
                "success": dict(zip(names, audit.success[number].tolist(), strict=True)),
            }
            for number in (*long, *rest)
        ]

    def summary(self) -> dict[str, Any]:
        """What `verdict.json` holds."""
        audit = self.audit
        return {
            "schema": 1,
            "verdict": audit.verdict,
            **written(self.paths, self.date),
            "sentences": self.sentences(),
            "score": audit.score,
            "p": float(audit.p.min()),
            "alarm": audit.alarm,
            "suspected_target": self.rows[0]["class"] if audit.suspicious else None,
            "classes": self.rows,
            "clean_images": len(audit.clean),
            "seconds": audit.seconds,
            "seconds_per_class": self._cost(),
            "skipped": self.skipped,
            "inputs": {
                "student": network_digest(audit.student),
                "teacher": network_digest(audit.teacher),
                "clean": audit.clean.digest,
            },
            "seed": audit.seed,
            **audit.compute.describe(),
            **environment(),
        }

    def sentences(self) -> list[str]:
        """The verdict, the first of them, and what it is worth."""
        audit, first = self.audit, self.rows[0]
        rates, name = first["success"], named(first["class"])
        verdict = "CLEAN: the smallest change that turns the student alone is"
        whose = f"It leads to {name}."
        if audit.suspicious:
            verdict = "SUSPICIOUS: a change turns the student and not its teacher, and it is"
            whose = f"Suspected target: {name}."
        return [
            f"{verdict} {first['times_smaller']:.2f} times smaller than is usual for this "
            f"student's classes (p = {first['p']:.2g}).",
            f"{whose} With it, {first['size_255']:.1f} of 255 levels (root mean square) and the "
            f"same for all images, the student calls {rates['student']:.0%} of the images of other "
            f"classes so, and the teacher {rates['teacher']:.0%}; {rates['student_alone']:.0%} "
            "turn the student while the teacher keeps its answer.",
            f"Of clean students, about {100 * audit.alarm:g}% are called suspicious, if they are "
            f"like the {FITTED} that this was fitted on.",
            f"It took {self._cost():.2f} seconds a class, with {len(audit.clean):,} clean images.",
        ]

    def _cost(self) -> float:
        return sum(self.audit.seconds.values()) / len(self.audit.usual)

    def print(self) -> None:
        """Prints the verdict, and the most suspicious classes."""
        first, *rest = self.sentences()
        console.print(Text(first, COLOURS[self.audit.verdict]))
        for sentence in rest:
            console.print(Text(sentence))
        if self.skipped:
            count = f"{len(self.skipped):,} files were not read; all are in verdict.json."
            console.print(Text(count))
        table = Table(title="The smallest changes")
        for name in ("to", "levels", "times smaller", "p", "student", "teacher", "student alone"):
            table.add_column(name, justify="left" if name == "to" else "right")
        for row in self.rows[:LISTED]:
            known = row["p"] is not None
            table.add_row(
                Text(named(row["class"])),
                f"{row['size_255']:.1f}",
                f"{row['times_smaller']:.2f}" if known else "-",
                f"{row['p']:.2g}" if known else "-",
                *(f"{share:.0%}" for share in row["success"].values()),
            )
        console.print(table)
        console.print(Text(f"Look at {self.folder / 'report.html'}; verdict.json has all classes."))

    def html(self) -> str:
        """The gallery, one file that asks nothing of the net."""
        return render(
            "foreshot.audit",
            "student.html.j2",
            sentences=self.sentences(),
            verdict=self.audit.verdict,
            about=told(self.paths, self.date),
            alarm=self.audit.alarm,
            rows=self.rows[:SHOWN],
            pictures=[self._pictures(row["index"]) for row in self.rows[:SHOWN]],
        )

    def _pictures(self, number: int) -> tuple[str, str]:
        """A change, magnified around grey, and an image of another class with it."""
        audit, pattern = self.audit, self.audit.changes.patterns[number]
        other = int((audit.said != number).nonzero()[0])
        image = to_float(audit.clean.images[other])
        return _shown(0.5 + pattern / pattern.abs().max().clamp(min=1e-12) / 2), _shown(
            image + pattern
        )


def _shown(picture: Tensor) -> str:
    return data_uri(to_uint8(picture.clamp(0, 1)))
