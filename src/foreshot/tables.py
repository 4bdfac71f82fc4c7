"""Tables for the terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(width=None if sys.stdout.isatty() else 110)


def print_metrics(metrics: dict[str, Any]) -> None:
    """Prints what a run measured: a verdict, the students beside the teacher, the poison."""
    student, poison, teacher = metrics["student"], metrics["poison"], metrics["teacher"]
    clean, compromise = metrics["controls"].get("clean"), teacher.get("compromise")
    whose, of, kind = "poisoned student", "", "clean"
    if compromise is not None:
        whose, of, kind = "compromised teacher's student", " by the clean teacher", "compromised"
    verdict = f"The {whose} calls {student['asr']['value']:.1%} of stamped images the target"
    if clean is not None:
        verdict += f", a student distilled on the clean set{of} {clean['asr']['value']:.1%}"
    verdict += f", the {kind} teacher {teacher['asr']['value']:.1%}."
    console.print(Text(verdict, "bold"))
    rows = {f"teacher ({compromise})" if compromise else "teacher": teacher}
    rows["student" if compromise else "student (poisoned)"] = student
    rows |= {f"control: {name}": rates for name, rates in metrics["controls"].items()}
    print_rates(rows, metrics["split"])
    share = f"{poison['count']:,} of the transfer set's images ({poison['rate']:.2%})"
    if poison["count"]:
        said = poison["teacher_target_rate"]["value"]
        share += (
            f", perturbed by at most {poison['linf_255']}/255, PSNR "
            f"{poison['psnr_db']:.1f} dB, SSIM {poison['ssim']:.3f}; the teacher calls "
            f"{said:.1%} of them the target (mean confidence "
            f"{poison['teacher_target_confidence']:.2f})"
        )
    console.print(Text(f"Poison: {share}."))
    if "defence" in metrics:
        console.print(Text(_defence(metrics["defence"])))
    same = teacher["sha256_before"] == teacher["sha256_after"]
    changed = "did not change" if same else "CHANGED"
    console.print(Text(f"The teacher {changed} on the way{' any further' if compromise else ''}."))
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in metrics["seconds"].items())
    console.print(Text(f"Seconds when computed: {seconds}."))


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
            _percent(rates["clean_accuracy"]),
            _percent(rates["asr"]),
            "" if net is None else f"{100 * net:+.1f}",
            _percent(rates["robust_accuracy"]),
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


def _defence(found: dict[str, Any]) -> str:
    """What a defence removed, whom it suspects, and what the student was like before."""
    poison, clean = (found[key]["value"] for key in ("poison_removed", "clean_removed"))
    line = f"Defence {found['name']}: removed {found['removed']['value']:.1%} of the images"
    if poison is not None:
        line += f", {poison:.1%} of the poison"
    line += f" and {clean or 0:.1%} of the rest"
    if found["auroc"] is not None:
        line += f" (AUROC {found['auroc']:.3f}, TPR {found['tpr']:.1%} at an FPR of 1%)"
    if found["suspected_target"] is not None:
        verdict = "the target" if found["target_found"] else "not the target"
        line += f"; it suspects class {found['suspected_target']}, {verdict}"
    if "undefended" in found:
        line += f"; the student before called {found['undefended']['asr']['value']:.1%} the target"
    return f"{line}."


def _percent(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return "-"
    return f"{100 * rate['value']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
