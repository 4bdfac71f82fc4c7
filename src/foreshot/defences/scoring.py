"""What a defence is worth: for the experimenter, who knows the poison and the trigger."""

from typing import Any

import torch
from torch import Tensor

from foreshot.data.base import ImageSet
from foreshot.defences.conformal import Verdict
from foreshot.defences.monitors.base import Monitor
from foreshot.defences.pool import there
from foreshot.inference import logits
from foreshot.metrics import rate
from foreshot.poison import Poison
from foreshot.triggers.base import Trigger, stamp_uint8
from foreshot.views import DefenderView


def found(scores: Tensor, poison: Poison) -> dict[str, float]:
    """How well a screen's scores (N,) of a transfer set tell the poison in it from the rest."""
    bad = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, poison.indices, True)
    return separation(scores[bad], scores[~bad])


def separation(bad: Tensor, good: Tensor, fpr: float = 0.01) -> dict[str, float]:
    """Figures of scores that should be high for what is bad, (n,), and low for what is good, (m,).

    Returns:
        `auroc`, the probability that a bad one is higher than a good one (ties count half);
        `tpr`, the share of the bad above the lowest threshold that at most a share `fpr` of the
        good ones exceed.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # takes a second to import

    scores = torch.cat([bad, good])
    truth = torch.arange(len(scores)) < len(bad)
    # All thresholds: one that lies on a line between others may be the lowest that is allowed.
    false, true, _ = roc_curve(truth.numpy(), scores.numpy(), drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(truth.numpy(), scores.numpy())),
        "tpr": float(true[false <= fpr].max()),
    }


def quality(verdict: Verdict, poison: Poison, target: int) -> dict[str, Any]:
    """What a verdict on a poisoned transfer set was worth.

    Args:
        verdict: what the defender concluded.
        poison: what lies in the set.
        target: the class that the attacker aims at.

    Returns:
        `auroc` and `tpr` of `found`, None where the set is not of both kinds; the rates `removed`,
        `poison_removed` and `clean_removed` of all images, of the poison and of the rest;
        `suspected_target`, a class, and whether it is right, `target_found`, both None where
        nothing is removed; `calibrated`.
    """
    bad, gone = (
        torch.zeros(len(verdict.scores), dtype=torch.bool).index_fill_(0, indices, True)
        for indices in (poison.indices, verdict.flagged)
    )
    both = 0 < len(poison) < len(bad)
    suspect = verdict.target
    return {
        **(found(verdict.scores, poison) if both else {"auroc": None, "tpr": None}),
        "removed": rate(gone),
        "poison_removed": rate(gone[bad]),
        "clean_removed": rate(gone[~bad]),
        "suspected_target": suspect,
        "target_found": None if suspect is None else suspect == target,
        "calibrated": verdict.calibrated,
    }


def watched(
    monitor: Monitor, view: DefenderView, test: ImageSet, trigger: Trigger, target: int
) -> dict[str, Any]:
    """What a monitor is worth to a student in use.

    Args:
        monitor: whose threshold the defender's clean images set.
        view: what the defender knows, with the student.
        test: labelled images that stand for the clean inputs.
        trigger: what the attacker puts on inputs of other classes than the target.
        target: the class that it shall mean.

    Returns:
        `auroc` and `tpr` of `separation`, stamped inputs against clean ones; the rates `flagged` of
        the stamped, `false_alarms` of the clean inputs, `asr_unnoticed` (stamped, called the
        target, not flagged) and `accuracy_unnoticed` (clean, called by their class, not flagged).
    """
    student, clean, labels = there(view.student), there(view.pool.calibration), there(test.labels)
    other = labels != target
    stamped = stamp_uint8(trigger, test.images[other])
    limit = monitor.threshold(monitor.suspicion(clean.images, view))
    bad, good = monitor.suspicion(stamped, view), monitor.suspicion(test.images, view)
    hit = logits(student, stamped, view.compute).argmax(1) == target
    right = logits(student, test.images, view.compute).argmax(1) == labels
    return {
        **separation(bad, good),
        "flagged": rate(bad > limit),
        "false_alarms": rate(good > limit),
        "asr_unnoticed": rate(hit & (bad <= limit)),
        "accuracy_unnoticed": rate(right & (good <= limit)),
    }
