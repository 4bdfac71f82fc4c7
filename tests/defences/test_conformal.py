"""P-values that hold, false discoveries that stay few: against scipy and by simulation."""

from math import ceil, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from scipy.stats import false_discovery_control, hmean
from sklearn.metrics import roc_auc_score
from torch import Tensor

from foreshot.defences.base import Scores
from foreshot.defences.combined import Combined, combined
from foreshot.defences.conformal import benjamini_hochberg, enriched, exponential_tails, p_values
from foreshot.defences.scoring import found
from foreshot.defences.screens import Frequency, Scan
from foreshot.errors import ForeshotError
from foreshot.poison import Poison


def normal(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def test_a_p_value_counts_the_clean_scores_that_are_as_high() -> None:
    clean = torch.tensor([3.0, 1.0, 2.0, 2.0])
    found = p_values(Scores(torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 9.0]), clean))
    assert (found * 5).round().tolist() == [5, 5, 4, 2, 2, 1]


def test_p_values_of_clean_images_are_uniform() -> None:
    rounds, clean = 4000, 19
    scores = normal(rounds, clean + 1).exp()
    p = torch.cat([p_values(Scores(row[:1], row[1:])) for row in scores])
    counts = torch.bincount((p * 20).round().long(), minlength=21)[1:]
    # Chi-squared of 20 equally likely values has mean 19 and standard deviation 6.2.
    assert ((counts - rounds / 20) ** 2 / (rounds / 20)).sum() < 19 + 4 * 6.2


@pytest.mark.parametrize("correlation", [0.0, 0.7, -0.45, 1.0])
def test_p_values_of_combined_screens_hold_whatever_their_dependence(correlation: float) -> None:
    rounds, clean, screens = 1000, 49, 3
    shared = normal(rounds, 1, clean + 1, seed=1)
    own = normal(rounds, screens, clean + 1, seed=2)
    if correlation < 0:  # as negative as three can be
        scores = own - own.mean(1, keepdim=True)
    else:
        scores = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
    p = []
    for row in scores:
        total = combined(list(row), clean)
        p.append(p_values(Scores(total[:1], total[1:])))
    p = torch.cat(p)
    for bound in (0.02, 0.04, 0.1, 0.2, 0.5):
        held = float((p <= bound + 1e-9).double().mean())
        assert held <= bound + 4 * (bound * (1 - bound) / rounds) ** 0.5
    assert p.mean() < 0.6  # it holds, and is not much too careful


def test_of_one_screen_alone_the_combined_scores_tell_as_much() -> None:
    scores = torch.arange(99.0, dtype=torch.float64)
    assert torch.equal(combined([scores], 49), scores)
    with pytest.raises(ValidationError, match="found the screen scan twice"):
        Combined(screens=(Scan(), Frequency(), Scan()))


def test_combined_scores_are_the_harmonic_mean_of_p_values() -> None:
    scores, silent = normal(3, 60), torch.zeros(60, dtype=torch.float64)
    p = np.stack([1 / (combined([row, silent], 20).exp().numpy() - 1) for row in scores])[:, 40:]
    np.testing.assert_allclose(3 / combined(list(scores), 20)[40:].exp().numpy(), hmean(p, axis=0))


def test_of_exponential_scores_the_evidence_is_that_of_their_law() -> None:
    scores = -torch.rand(100001, generator=torch.Generator().manual_seed(0)).double().log()
    found = combined([scores, torch.zeros_like(scores)], 100000)[1:].expm1().log()
    torch.testing.assert_close(found, scores[1:], rtol=0.02, atol=0.02)  # P(s > x) = exp(-x)


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float64, (7, 24), elements=st.sampled_from([-1.0, 0.0, 0.3, 0.6, 2.1, 9.0, 1e9])),
    st.lists(st.integers(0, 23), min_size=24, max_size=24),
    st.sampled_from([2, 3, 7]),
    st.sampled_from([1, 3, 19]),
)
def test_of_the_clean_images_and_one_more_no_more_than_k_have_p_values_of_the_first_k(
    scores: np.ndarray, same: list[int], screens: int, clean: int
) -> None:
    pool, p = torch.from_numpy(scores)[:screens, same], list[float]()  # many images are alike
    for image in range(24 - clean - 1, 24):  # each takes the place of the one more in turn
        others = [other for other in range(24) if other != image]
        order = [*others[: 23 - clean], image, *others[23 - clean :]]
        total = combined(list(pool[:, order]), clean)
        p.append(float(p_values(Scores(*total.split([24 - clean, clean])))[-1]))
    for k, of_the_first in enumerate(sorted(p), start=1):
        assert of_the_first > (k - 0.5) / (clean + 1)


def test_an_image_is_compared_with_the_clean_ones_as_if_it_were_one_of_them() -> None:
    scores, clean = normal(3, 160).numpy(), 120
    ranks = range(ceil(0.97 * 121), ceil(0.99 * 121) + 1)
    law = -np.log([2 * (121 - k) / 121 for k in ranks]).mean()

    def as_high(image: int, more: list[float]) -> int:
        """Clean images as high as this one, by tails of them and one more score a screen."""
        total = np.zeros(121)
        for row, its in zip(scores, more, strict=True):
            median, compared = np.sort(row)[79], np.append(row[40:], row[image])
            tail = np.sort(np.append(row[40:], its))[[k - 1 for k in ranks]].mean() - median
            usual = 1 / np.array([(row >= score).mean() for score in compared])
            beyond = 2 * np.exp(law * (compared - median) / tail)
            total += np.where(compared > median, beyond, usual)
        return int((total[:-1] >= total[-1] - 1e-9).sum())

    found = p_values(Scores(*combined(list(torch.from_numpy(scores)), clean).split([40, clean])))
    for image in range(40):
        ranked = as_high(image, list(scores[:, image])), as_high(image, [np.inf] * 3)
        assert float(found[image]) * 121 == pytest.approx(1 + max(ranked))


def test_what_one_screen_puts_far_beyond_is_not_lost_among_the_highest_of_the_others() -> None:
    scores = normal(6, 2000 + 500)
    scores[0, :20] = 5  # the highest of 500 clean ones: 3
    p = p_values(Scores(*combined(list(scores), 500).split([2000, 500])))
    assert float(p[:20].max()) < 0.004
    assert float((p[20:] <= 0.02).double().mean()) < 0.03


def test_screens_whose_scores_are_steps_do_not_spare_the_images_of_the_transfer_set() -> None:
    step = torch.bucketize(torch.arange(2500) % 500, torch.tensor([300, 490]), right=True).double()
    flagged = list[Tensor]()
    for seed in range(10):  # the next step begins at 98 % of the clean scores
        scores = combined([step, *normal(2, 2500, seed=seed)], 500)
        flagged.append(p_values(Scores(*scores.split([2000, 500]))) <= 0.02)
    assert 0.01 < float(torch.cat(flagged).double().mean()) < 0.03


@pytest.mark.parametrize("no_number", [torch.nan, torch.inf, -torch.inf])
def test_a_screen_that_gives_no_number_is_named(no_number: float) -> None:
    scores = [normal(60), normal(60).index_fill(0, torch.tensor([7]), no_number)]
    with pytest.raises(ForeshotError, match="expected finite scores"):
        combined(scores, 20)


def test_screens_whose_clean_scores_have_no_spread_say_nothing() -> None:
    flat = torch.zeros(250, dtype=torch.float64).index_fill(0, torch.tensor([3, 200]), 1.0)
    other = normal(250)
    alone = combined([other, torch.zeros_like(flat)], 100)
    assert torch.equal(combined([other, flat], 100), alone)
    lone = combined([normal(12), torch.zeros(12, dtype=torch.float64)], 1)
    assert lone.max() < log(1 + 12)  # one clean image tells of no tail
    steps = torch.cat([torch.zeros(240), torch.arange(10.0)]).double()
    assert torch.isfinite(combined([steps, flat], 100)).all()


@pytest.mark.parametrize("screens", [1, 2, 4])
def test_without_clean_images_a_guess_loses_no_more_clean_images_than_with(screens: int) -> None:
    scores = combined(list(normal(screens, 20000)), 0)
    for bound in (0.01, 0.05):
        assert float((exponential_tails(scores) <= bound).double().mean()) < 1.3 * bound


def test_where_most_scores_are_equal_nothing_can_be_said_of_the_others() -> None:
    scores = torch.tensor([0.4] * 800 + [0.6] * 150 + [1.0] * 50, dtype=torch.float64)
    assert not len(benjamini_hochberg(exponential_tails(scores), 0.2))


def test_p_values_at_the_bound_are_flagged() -> None:
    p = torch.ones(1000, dtype=torch.float64).index_fill(0, torch.arange(200), 0.01)
    assert len(benjamini_hochberg(p, 0.05)) == 200


@pytest.mark.parametrize("level", [0.01, 0.05, 0.3])
def test_what_is_flagged_is_what_scipy_flags(level: float) -> None:
    for seed in range(20):
        p = torch.special.ndtr(normal(200, seed=seed) - 3 * (torch.arange(200) < 30))
        p = (p * 100).ceil() / 100  # with ties
        expected = np.flatnonzero(false_discovery_control(p.numpy()) <= level * (1 + 1e-12))
        assert benjamini_hochberg(p, level).tolist() == expected.tolist()


def test_false_discoveries_stay_below_the_level() -> None:
    shares, power = [], []
    for seed in range(150):
        poison = torch.arange(400) < 40
        scores = Scores(normal(400, seed=seed) + 4 * poison, normal(500, seed=1000 + seed))
        flagged = benjamini_hochberg(p_values(scores), 0.1)
        shares.append(float((~poison[flagged]).sum()) / max(len(flagged), 1))
        power.append(float(poison[flagged].sum()) / 40)
    assert np.mean(shares) < 0.1 + 3 * np.std(shares) / 150**0.5
    assert np.mean(power) > 0.8


def test_the_suspect_is_the_class_that_flagging_favours_not_the_largest() -> None:
    said = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    assert enriched(said, torch.cat([torch.arange(20), torch.arange(90, 100)])) == 2
    assert enriched(said, torch.zeros(0, dtype=torch.int64)) is None


def test_a_perfect_screen_finds_all_and_a_random_one_as_much_as_chance() -> None:
    indices = torch.arange(0, 4000, 20)
    poison = Poison(indices, torch.zeros(200, 1, 1, 1, dtype=torch.uint8))
    truth = torch.zeros(4000, dtype=torch.float64).index_fill(0, indices, 1)
    assert found(truth, poison) == {"auroc": 1.0, "tpr": 1.0}
    assert found(-truth, poison) == {"auroc": 0.0, "tpr": 0.0}
    chance = found(normal(4000), poison)
    error = (4001 / (12 * 200 * 3800)) ** 0.5  # of the Mann-Whitney statistic
    assert abs(chance["auroc"] - 0.5) < 3 * error
    assert chance["tpr"] < 0.01 + 3 * (0.01 / 200) ** 0.5
    noisy = truth + normal(4000)
    assert found(noisy, poison)["auroc"] == pytest.approx(roc_auc_score(truth, noisy))
    bound = noisy[truth == 0].sort(descending=True).values[38]
    assert found(noisy, poison)["tpr"] == pytest.approx(
        float((noisy[truth == 1] > bound).double().mean()), abs=0.006
    )
