"""A p-value for a whole set."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foreshot.defences.base import Scores
from foreshot.seeding import generator

DRAWS = 999
TOGETHER = 1 << 20
"""Clean images, over several draws, that are looked at together."""
PLACES = 40
"""How many of the most suspicious images are looked at: that many numbers, in even ratios."""


@dataclass(frozen=True)
class SetTest:
    """What is concluded of a set.

    Args:
        p: probability, over the draw of the clean images, of so low a value if nothing is poisoned.
        smallest: the smallest share of the set that poison must have to be found at all, by a
            screen that ranks all of it before all that is clean; None if none can be found.
    """

    p: float
    smallest: float | None


def set_test(screens: list[Scores], alarm: float, seed: int) -> SetTest:
    """Tests whether transfer set and clean images are exchangeable, against poison among the first.

    Of the m most suspicious images of the pool, by one screen, c are clean ones of the defender's.
    If nothing is poisoned, c is hypergeometric; poison pushes it down. The statistic is the
    smallest such tail of any screen and any of 40 values of m, and its p-value that of the
    permutations of who is clean (min-P, Westfall and Young 1993), (1 + b) / (1 + B) with b of B
    draws as small (Phipson and Smyth, arXiv 1603.05766). This is exact however screens and images
    depend on one another, as no screen knows who is clean (Marandon et al., arXiv 2208.06685).

    It finds less poison than Benjamini and Hochberg's procedure over the images' p-values can:
    n > log(1 / level) / s clean images reveal a share s, where that needs n > 1 / (level s).

    Args:
        screens: the scores of each; `clean` must not be empty.
        alarm: the level at which `smallest` is meant.
        seed: of the draws.
    """
    from scipy.stats import hypergeom  # takes a second to import

    transfer, clean = len(screens[0].transfer), len(screens[0].clean)
    pool = transfer + clean
    random = generator(seed, "audit", "set")
    # Ties are broken by lot, which knows as little of who is clean.
    lot = torch.randperm(pool, generator=random)
    orders = [torch.cat([s.transfer, s.clean])[lot].argsort(descending=True) for s in screens]
    ranks = torch.stack([lot[order].argsort() for order in orders])  # of each image, per screen
    places = torch.from_numpy(np.unique(np.geomspace(1, max(pool // 2, 1), PLACES).round()))

    def among_the_first(chosen: Tensor) -> Tensor:
        """How many of the chosen (B, n) are among the first m: (screens, B, places)."""
        mine = ranks[:, chosen].sort(2).values.double()
        return torch.searchsorted(mine, places.expand(*mine.shape[:2], -1).contiguous())

    counts = [among_the_first(torch.arange(transfer, pool)[None])]
    for some in torch.arange(DRAWS).split(max(TOGETHER // clean, 1)):
        draws = [torch.randperm(pool, generator=random)[:clean] for _ in some]
        counts.append(among_the_first(torch.stack(draws)))
    found = torch.cat(counts, 1)
    # Equal counts have equal tails, to the last bit: each is computed once.
    values = np.arange(int(found.max()) + 1)[:, None]
    tails = torch.from_numpy(hypergeom.cdf(values, pool, clean, places.numpy()))
    least = tails.gather(0, found.flatten(0, 1)).reshape(found.shape).amin((0, 2))
    # With nothing but poison among the first, no clean image is there.
    p = (1 + (least[1:, None] <= tails[0]).sum(0)) / (1 + DRAWS)
    enough = places[(p <= alarm) & (places <= transfer)]
    return SetTest(
        p=(1 + int((least[1:] <= least[0]).sum())) / (1 + DRAWS),
        smallest=float(enough[0] / transfer) if len(enough) else None,
    )
