"""How well a screen finds the poison: for the experimenter, who knows where it is."""

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

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
    truth = torch.zeros(len(scores)).index_fill_(0, poison.indices, 1).numpy()
    false, true, _ = roc_curve(truth, scores.numpy())
    return {
        "auroc": float(roc_auc_score(truth, scores.numpy())),
        "tpr": float(true[false <= fpr].max()),
    }
