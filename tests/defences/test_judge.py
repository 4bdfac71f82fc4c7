"""Which images a verdict flags: by p-value, by false discovery rate, by share."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from conftest import Tiny, stripes
from foreshot.compute import CPU
from foreshot.defences import judge
from foreshot.defences.pool import Pool
from foreshot.defences.screens import NearDuplicate
from foreshot.errors import ForeshotError
from foreshot.views import DefenderView


class Dice(NearDuplicate):
    """A screen that knows some images of the transfer set, and of the others nothing."""

    known: ClassVar[Tensor]
    seed: ClassVar[int] = 0

    def suspicion(self, pool: Pool) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(len(pool), generator=random, dtype=torch.float64)
        return scores.index_fill(0, self.known, 2)


def seen(tiny: Tiny, clean: int) -> DefenderView:
    return DefenderView(tiny.train, tiny.teacher, None, stripes(clean, 5), 0, CPU)


def test_of_clean_images_that_share_is_flagged_and_however_little_poison(tiny: Tiny) -> None:
    Dice.known, shares = torch.tensor([3, 17]), []
    for Dice.seed in range(60):
        flagged = judge(Dice(), seen(tiny, 120), 0.05).flagged
        assert {3, 17} <= set(flagged.tolist())
        shares.append((len(flagged) - 2) / (len(tiny.train) - 2))
    # At most a share (k + 1) / 61 of p-values is as low as the k-th: 3 of 61 here.
    assert sum(shares) / len(shares) == pytest.approx(3 / 61, abs=0.01)
    # A rate of false discoveries of a fifth cannot be promised of two images.
    assert not len(judge(Dice(), seen(tiny, 120), level=0.2).flagged)


def test_by_the_rate_of_false_discoveries_a_clean_set_stays_whole(tiny: Tiny) -> None:
    Dice.known = torch.arange(0, len(tiny.train), 3)
    found = judge(Dice(), seen(tiny, 120), level=0.1)
    assert set(Dice.known.tolist()) <= set(found.flagged.tolist())
    assert len(found.flagged) < 1.15 * len(Dice.known)
    Dice.known = torch.zeros(0, dtype=torch.int64)
    assert not len(judge(Dice(), seen(tiny, 120), level=0.1).flagged)
    assert len(judge(Dice(), seen(tiny, 120), remove=0.1).flagged) == len(tiny.train) // 10


def test_too_few_clean_images_for_a_p_value_are_one_sentence(tiny: Tiny) -> None:
    Dice.known = torch.tensor([0])
    assert len(judge(Dice(), seen(tiny, 37), 0.05).flagged) >= 1
    with pytest.raises(ForeshotError) as error:
        judge(Dice(), seen(tiny, 36), 0.05)
    assert str(error.value) == (
        "screen near_duplicate: expected at least 37 clean images (defender.clean) for p-values of "
        "0.05, found 36, with which none is below 0.053"
    )
    assert not len(judge(Dice(), seen(tiny, 36), level=0.01).flagged)
