"""How well a screen finds the poison: for the experimenter, who knows where it is."""

from typing import Any

import torch
from torch import Tensor

from foreshot.defences.conformal import Verdict
from foreshot.metrics import rate
from foreshot.poison import Poison


def found(scores: Tensor, poison: Poison, fpr: float = 0.01) -> dict[str, float]:
    """Figures of a screen's scores of a poisoned transfer set.

    Args:
        scores: float (N,), higher = more suspicious.
        poison: what lies in the set.
        fpr: share of the clean images that may be flagged with the poison.

    Returns:
        `auroc`, the probability that a poisoned image scores higher than a clean one (ties count
        half); `tpr`, the share of the poison above the lowest threshold that flags at most `fpr`
        of the clean images.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # takes a second to import

    truth = torch.zeros(len(scores)).index_fill_(0, poison.indices, 1).numpy()
    false, true, _ = roc_curve(truth, scores.numpy())
    return {
        "auroc": float(roc_auc_score(truth, scores.numpy())),
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
