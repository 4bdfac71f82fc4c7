"""Tables for the terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(width=None if sys.stdout.isatty() else 110)


def print_metrics(metrics: dict[str, Any]) -> None:
    """Prints what a run measured: a verdict, the students beside the teacher, the poison."""
    teacher = metrics["teacher"]
    console.print(Text(verdict(metrics), "bold"))
    print_rates(rows(metrics), metrics["split"])
    console.print(Text(poison_sentence(metrics["poison"])))
    if "defence" in metrics:
        console.print(Text(defence_sentence(metrics["defence"])))
    console.print(Text(teacher_sentence(teacher)))
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in metrics["seconds"].items())
    console.print(Text(f"Seconds when computed: {seconds}."))


def verdict(metrics: dict[str, Any]) -> str:
    """What became of the student, and what the clean student and the teacher do instead."""
    student, teacher = metrics["student"], metrics["teacher"]
    clean, compromise = metrics["controls"].get("clean"), teacher.get("compromise")
    whose, of, kind = "poisoned student", "", "clean"
    if compromise is not None:
        whose, of, kind = "compromised teacher's student", " by the clean teacher", "compromised"
    said = f"The {whose} calls {student['asr']['value']:.1%} of stamped images the target"
    if clean is not None:
        said += f", a student distilled on the clean set{of} {clean['asr']['value']:.1%}"
    return f"{said}, the {kind} teacher {teacher['asr']['value']:.1%}."


def rows(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The models that a run evaluated, by what people call them."""
    compromise = metrics["teacher"].get("compromise")
    named = {f"teacher ({compromise})" if compromise else "teacher": metrics["teacher"]}
    named["student" if compromise else "student (poisoned)"] = metrics["student"]
    return named | {f"control: {name}": rates for name, rates in metrics["controls"].items()}


def poison_sentence(poison: dict[str, Any]) -> str:
    """How much poison there is, how visible it is, and what the teacher says of it."""
    share = f"{poison['count']:,} of the transfer set's images ({poison['rate']:.2%})"
    if poison["count"]:
        said = poison["teacher_target_rate"]["value"]
        share += (
            f", perturbed by at most {poison['linf_255']}/255, PSNR "
            f"{poison['psnr_db']:.1f} dB, SSIM {poison['ssim']:.3f}; the teacher calls "
            f"{said:.1%} of them the target (mean confidence "
            f"{poison['teacher_target_confidence']:.2f})"
        )
    return f"Poison: {share}."


def teacher_sentence(teacher: dict[str, Any]) -> str:
    """Whether the teacher's weights are what they were."""
    same = teacher["sha256_before"] == teacher["sha256_after"]
    changed = "did not change" if same else "CHANGED"
    return f"The teacher {changed} on the way{' any further' if teacher.get('compromise') else ''}."


def print_rates(rows: dict[str, dict[str, Any]], split: str) -> None:
    """Prints clean accuracy and attack success rate of several models, with 95 % intervals."""
    table = Table(title=f"Rates in % on the {split} split, with Wilson 95 % intervals")
    columns = ("clean accuracy", "ASR", "net ASR", "robust accuracy")
    table.add_column("model")
    for column in columns:
        table.add_column(column, justify="right")
    for name, rates in rows.items():
        net = rates.get("asr_net")
        table.add_row(
            Text(name),
            percent(rates["clean_accuracy"]),
            percent(rates["asr"]),
            "" if net is None else f"{100 * net:+.1f}",
            percent(rates["robust_accuracy"]),
        )
    console.print(table)
    console.print(
        Text("ASR: stamped images of other classes that the model calls the target.", "dim")
    )


def print_families() -> None:
    """Prints all presets and all members of all families, one line each."""
    from foreshot.attacks import ATTACKS
    from foreshot.compression import COMPRESSIONS
    from foreshot.compromises import COMPROMISES
    from foreshot.config import presets
    from foreshot.data import DATASETS
    from foreshot.defences import DEFENCES
    from foreshot.distillation import LOSSES
    from foreshot.models import ARCHITECTURES
    from foreshot.triggers import TRIGGERS

    lines = [path.read_text(encoding="utf-8").split("\n", 1)[0] for path in presets().values()]
    print("presets (foreshot run NAME)")
    for name, line in zip(presets(), lines, strict=True):
        print(f"  {name:20} {line.lstrip('# ')}")
    families = {
        "datasets (data.name)": DATASETS,
        "models (teacher.model.name, student.model.name)": ARCHITECTURES,
        "triggers (trigger.name)": TRIGGERS,
        "attacks (attack.name)": ATTACKS,
        "defences (defence.name)": DEFENCES,
        "losses (distillation.terms.0.loss.name)": LOSSES,
        "compressions (compression.name)": COMPRESSIONS,
        "compromised teachers, for reference (compromise.name)": COMPROMISES,
    }
    for title, family in families.items():
        print(f"\n{title}")
        for name, member in family.items():
            print(f"  {name:20} {member.summary()}")


def defence_sentence(found: dict[str, Any]) -> str:
    """What a defence did, and what the student was like before."""
    did = {
        "screen": _removed,
        "distilling": lambda _: "changed what the student is distilled on, or from whom",
        "repair": lambda _: "mended the student",
        "monitor": _flagged,
    }
    line = f"Defence {found['name']}: {did[found['kind']](found)}"
    if "own_teacher" in found:
        line += f"; its own teacher is right {found['own_teacher']['clean_accuracy']['value']:.1%}"
        line += " of the time"
    if "undefended" in found:
        before, mended = found["undefended"], found["kind"] == "repair"
        line += "; before, the student" if mended else "; a student of the whole set"
        line += f" was right {before['clean_accuracy']['value']:.1%} of the time"
        line += f" and called {before['asr']['value']:.1%} of stamped images the target"
    return f"{line}."


def _removed(found: dict[str, Any]) -> str:
    """What a screen removed, and whom it suspects."""
    poison, clean = (found[key]["value"] for key in ("poison_removed", "clean_removed"))
    line = f"removed {found['removed']['value']:.1%} of the images"
    if poison is not None:
        line += f", {poison:.1%} of the poison"
    line += f" and {clean or 0:.1%} of the rest{_separation(found)}"
    if found["suspected_target"] is not None:
        verdict = "the target" if found["target_found"] else "not the target"
        line += f"; it suspects class {found['suspected_target']}, {verdict}"
    return line


def _flagged(found: dict[str, Any]) -> str:
    """What a monitor flagged, and what passed it."""
    return (
        f"flagged {found['flagged']['value']:.1%} of the stamped inputs and "
        f"{found['false_alarms']['value']:.1%} of the others{_separation(found)}; "
        f"{found['asr_unnoticed']['value']:.1%} are called the target unnoticed"
    )


def _separation(found: dict[str, Any]) -> str:
    if found["auroc"] is None:
        return ""
    return f" (AUROC {found['auroc']:.3f}, TPR {found['tpr']:.1%} at an FPR of 1%)"


def percent(rate: dict[str, Any]) -> str:
    """A rate in percent, with its interval."""
    if rate["value"] is None:
        return "-"
    return f"{100 * rate['value']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
