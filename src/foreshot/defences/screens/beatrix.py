"""Products of features."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from foreshot.defences.base import Screen
from foreshot.defences.pool import Need, Pool


class Beatrix(Screen):
    """Beatrix: products of features are unusual (Ma et al., arXiv 2209.11715).

    The mean over i <= j of |h_i h_j - median| / scale, for the student's features h, with the
    median of the reference images to which the teacher gives the same answer (of all of them,
    where there are none), and the mean absolute deviation from it, over all classes, as the scale.
    The paper takes powers of feature maps, whose Gram matrix sums over places; for a vector of
    features all powers say the same. Its authors' code counts only what lies beyond ten median
    absolute deviations of each class, and then judges classes by their kernel mean discrepancy;
    here all deviations count, and images are ranked.
    """

    name: Literal["beatrix"] = "beatrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "student"})

    def suspicion(self, pool: Pool) -> Tensor:
        known, answers = pool.student_on_reference.features.double(), pool.teacher_on_reference.said
        features, said = pool.student.features.double(), pool.teacher.said
        classes, members = answers.unique(return_inverse=True)
        row = torch.full((pool.teacher.logits.shape[1],), len(classes)).scatter(
            0, classes, torch.arange(len(classes))
        )[said]
        total = torch.zeros(len(pool), dtype=torch.float64)
        width = features.shape[1]
        for i in range(width):  # one row of all Gram matrices at a time: they would fill memory
            usual, now = (
                known[:, i:] * known[:, i : i + 1],
                features[:, i:] * features[:, i : i + 1],
            )
            centres = torch.stack(
                [usual[members == c].median(0).values for c in range(len(classes))]
                + [usual.median(0).values]
            )
            scale = (usual - centres[members]).abs().mean(0)
            alive = scale > 1e-12
            total += ((now - centres[row]).abs()[:, alive] / scale[alive]).sum(1)
        return total / (width * (width + 1) / 2)
