"""The page of one run: what was done, what came of it, and how to do it again."""

import json
import shlex
from typing import Any

from foreshot.compute import Compute
from foreshot.division import Parts
from foreshot.errors import printable
from foreshot.files import file_digest
from foreshot.record import Run
from foreshot.report import charts
from foreshot.report.images import pictures
from foreshot.report.page import named, png_uri, render
from foreshot.report.settings import (
    ABSENT,
    command,
    differences,
    leaves,
    nearest_preset,
    shown,
)
from foreshot.stages import GLANCE
from foreshot.tables import (
    defence_sentence,
    percent,
    poison_sentence,
    rows,
    teacher_sentence,
    verdict,
)

ABOUT = ("device", "precision", "threads", "seed")
"""What the manifest tells of a run beside versions, source and host."""


def page(run: Run, parts: Parts | str, compute: Compute) -> str:
    """The page as HTML.

    Args:
        run: a run with metrics.
        parts: its images, or why they cannot be had.
        compute: where to ask the models.
    """
    metrics, manifest = run.metrics, run.manifest
    preset, base = nearest_preset(run.config)
    theirs, changed = leaves(base), differences(run.config, base)
    models = rows(metrics)
    undefended = metrics.get("defence", {}).get("undefended")
    if undefended:
        models["student (undefended)"] = undefended
    loss, accuracy, asr = (told(run, key) for key in ("loss", "clean accuracy", "ASR"))
    return render(
        "foreshot.report",
        "one.html.j2",
        name=named(run.path.resolve().name),
        verdict=verdict(metrics),
        sentences=_sentences(metrics),
        split=metrics["split"],
        models=[
            (
                name,
                percent(rates["clean_accuracy"]),
                percent(rates["asr"]),
                "" if rates.get("asr_net") is None else f"{100 * rates['asr_net']:+.1f}",
                percent(rates["robust_accuracy"]),
            )
            for name, rates in models.items()
        ],
        missing=printable(parts) if isinstance(parts, str) else "",
        drawn=_drawn(run),
        pictures=None if isinstance(parts, str) else pictures(run, parts, compute),
        losses=charts.losses(loss) if loss else None,
        rates=charts.rates(asr, accuracy) if asr else None,
        glance=GLANCE,
        stealth=_figures(metrics["poison"]),
        defence=_figures(
            {k: v for k, v in metrics.get("defence", {}).items() if k != "undefended"}
        ),
        seconds=metrics["seconds"].items(),
        preset=preset,
        config=[
            (key, shown(value), shown(theirs.get(key, ABSENT)) if key in changed else None)
            for key, value in leaves(run.config).items()
        ],
        command=command(run.config, preset),
        recorded=printable(shlex.join(["foreshot", *manifest["command"]])),
        about={
            **manifest["versions"],
            **manifest["source"],
            **manifest["host"],
            **{key: manifest[key] for key in ABOUT if key in manifest},
            **{f"data: {name}": digest for name, digest in manifest["inputs"].items()},
            "manifest.json": file_digest(run.path / "manifest.json"),
        }.items(),
    )


def _sentences(metrics: dict[str, Any]) -> list[str]:
    said = [poison_sentence(metrics["poison"])]
    if "defence" in metrics:
        said.append(defence_sentence(metrics["defence"]))
    return [*said, teacher_sentence(metrics["teacher"])]


def _figures(block: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a part of `metrics.json`, as rows of a table."""
    found = []
    for key, value in block.items():
        if isinstance(value, dict) and "hits" in value:
            if value["total"]:
                found.append((key, f"{percent(value)} % ({value['hits']:,} of {value['total']:,})"))
        elif isinstance(value, dict):
            found += [(f"{key}.{name}", text) for name, text in _figures(value)]
        elif value is not None:
            found.append((key, f"{value:.4g}" if isinstance(value, float) else shown(value)))
    return found


def _drawn(run: Run) -> list[str]:
    """The pictures that the run itself has drawn."""
    files = [run.path / name for name in ("trigger.png", "poison.png")]
    return [png_uri(file.read_bytes()) for file in files if file.exists()]


def told(run: Run, key: str) -> dict[str, list[tuple[int, float]]]:
    """A figure after each epoch of each training that has it, by what `events.jsonl` tells."""
    path = run.path / "events.jsonl"
    stages: dict[str, dict[int, float]] = {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
            if event["kind"] == "epoch":
                done, value = int(event["done"]), float(event["values"][key])
                stages.setdefault(named(event["stage"], 40), {})[done] = value
        except (ValueError, KeyError, TypeError):
            continue  # the run was killed while it wrote, or the file is not what it wrote
    return {
        stage: [(epoch, points[done]) for epoch, done in enumerate(sorted(points), 1)]
        for stage, points in stages.items()
    }
