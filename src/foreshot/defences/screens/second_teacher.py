"""Another teacher's answer."""

from typing import ClassVar, Literal

from torch import Tensor

from foreshot.defences.base import Screen, margin
from foreshot.defences.pool import Need, Pool, there


class SecondTeacher(Screen):
    """A second teacher disagrees with the first (ensembles: Bagnall et al., arXiv 1712.04006).

    With c the first teacher's answer and m(z) = max_{j != c} z_j - z_c, the score is
    m(f_2(x)) - m(f_1(x)): the surer the first and the surer the second of something else, the more
    suspicious. Blind to perturbations that transfer from one teacher to the other.
    """

    name: Literal["second_teacher"] = "second_teacher"
    needs: ClassVar[frozenset[Need]] = frozenset({"second"})

    def suspicion(self, pool: Pool) -> Tensor:
        said = pool.teacher.said
        second = margin(pool.asked(there(pool.view.second)), said)
        return second - margin(pool.teacher.logits, said)
