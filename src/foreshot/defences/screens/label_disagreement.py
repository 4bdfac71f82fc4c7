"""The labels that the images came with."""

from typing import ClassVar, Literal

from torch import Tensor

from foreshot.defences.base import Screen, margin
from foreshot.defences.pool import Need, Pool


class LabelDisagreement(Screen):
    """The teacher contradicts the label of the set (margin of Northcutt et al., arXiv 1911.00068).

    The score is max_{j != y} f(x)_j - f(x)_y, in logits, of the label y that the image came with.
    Nothing else is needed where the poisoner kept true labels, and nothing is seen where the set
    has none, or the poisoner wrote the target there.
    """

    name: Literal["label_disagreement"] = "label_disagreement"
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})

    def suspicion(self, pool: Pool) -> Tensor:
        return margin(pool.teacher.logits, pool.labels)
