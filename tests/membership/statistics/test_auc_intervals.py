"""The interval of an AUC and the paired test: by definition, and their error for few members by simulation."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import ndtri
from scipy.stats import binom, t

from kr_fast.membership import delong_test, roc
from kr_fast.membership.statistics.auc_intervals import PRIOR, chance_above, chance_moments, chance_range


def draw(rng, members, others, effect=0.0, step=None):
    scores = np.concatenate([rng.normal(effect, 1, members), rng.normal(0, 1, others)])
    return scores if step is None else np.where(scores > ndtri(1 - step), 1.0, 0.0) if step < 0.5 else np.round(scores)


def curve_of(scores, members):
    return roc(torch.from_numpy(scores), torch.arange(len(scores)) < members)


def rate_is(hits, trials, low, high):
    """A rate from ``low`` to ``high``, within three standard errors of the simulation."""
    error = 3 * (np.array([low * (1 - low), high * (1 - high)]) / trials) ** 0.5
    assert low - error[0] <= hits / trials <= high + error[1], hits / trials


def pair_matrix(scores, members):
    inside, outside = scores[:members, None], scores[None, members:]
    return (inside > outside) + 0.5 * (inside == outside)


def refuted(scores, members, truth, z):
    """Whether the definition's test refutes the AUC ``truth``, from the matrix of all pairs and scipy's ranks."""
    from scipy.stats import rankdata, tiecorrect

    pairs = pair_matrix(scores, members)
    auc, c = pairs.mean(), tiecorrect(rankdata(scores))
    h = (truth / (2 - truth) + 2 * truth**2 / (1 + truth)) / 2 - truth**2
    scale = truth * (1 - truth) / (auc * (1 - auc))
    sides = (len(pairs), pairs.mean(1).var(ddof=1)), (pairs.shape[1], pairs.mean(0).var(ddof=1))
    v = [(PRIOR * c * h + (k - 1) * s * scale) / (PRIOR + k - 1) / k for k, s in sides]
    return (auc - truth) ** 2 - z**2 * (sum(v) + c * (truth * (1 - truth) - 2 * h) / pairs.size)


@pytest.mark.parametrize("step", [None, 0.2, 1])
@pytest.mark.parametrize(("members", "others"), [(5, 40), (70, 110)])
def test_interval_is_that_of_its_definition(members, others, step):
    scores = draw(np.random.default_rng(0), members, others, 0.9, step)
    curve = curve_of(scores, members)
    low, high = curve.auc_interval(0.9)
    for end, outer in ((low, 1e-9), (high, 1 - 1e-9)):
        expected = brentq(lambda t: refuted(scores, members, t, ndtri(0.95)), outer, curve.auc)
        assert end == pytest.approx(min(expected, 0.5) if outer < 0.5 and end == 0.5 else expected, abs=1e-9)


def test_of_many_examples_it_is_delongs():
    """2,000 beside 3,000: DeLong's ends to a hundredth of the width, and the same about an AUC below one half."""
    scores = draw(np.random.default_rng(1), 2000, 3000, 0.5)
    pairs = pair_matrix(scores, 2000)
    reach = 1.959964 * (pairs.mean(1).var(ddof=1) / 2000 + pairs.mean(0).var(ddof=1) / 3000) ** 0.5
    low, high = curve_of(scores, 2000).auc_interval()
    assert (low, high) == pytest.approx((pairs.mean() - reach, pairs.mean() + reach), abs=0.02 * reach)
    mirrored = curve_of(-scores, 2000).auc_interval()
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize("step", [None, 0.05, 1])
def test_moments_of_chance_are_those_of_all_draws(step):
    """Every choice of 3 members among 9 examples, by itself."""
    from itertools import combinations

    scores = draw(np.random.default_rng(2), 3, 6, 0.0, step)
    scores[0] = 1.0
    result = []
    for chosen in combinations(range(9), 3):
        order = np.r_[list(chosen), np.setdiff1d(np.arange(9), chosen)]
        result.append(pair_matrix(scores[order], 3).mean())
    values = np.array(result)
    _, deviation, skewness = chance_moments(*curve_of(scores, 3).groups)
    assert deviation == pytest.approx(values.std(), abs=1e-12)
    assert skewness == pytest.approx(((values - 0.5) ** 3).mean() / values.std() ** 3, abs=1e-9)


@pytest.mark.parametrize("members", [1, 3, 6, 8])
@pytest.mark.parametrize("step", [0.3, 1])
def test_share_of_draws_above_is_that_of_all_draws(members, step):
    """Of 9 examples with ties, every choice of members: mid-p."""
    from itertools import combinations

    scores = np.sort(draw(np.random.default_rng(8), 3, 6, 0.0, step))
    scores[-1] = 2.0
    result = []
    for chosen in combinations(range(9), members):
        order = np.r_[list(chosen), np.setdiff1d(np.arange(9), chosen)]
        curve = curve_of(scores[order], members)
        result.append((curve.auc, chance_above(*curve.groups, curve.auc)))
    values = np.array([auc for auc, _ in result])
    for auc, share in result:
        assert share == pytest.approx(((values > auc + 1e-12).mean() + (values >= auc - 1e-12).mean()) / 2, abs=1e-9)


@pytest.mark.parametrize("flagged", [0.02, 0.5, 0.98])
def test_share_of_draws_above_by_the_curve_is_near_the_exact_one(flagged):
    """60 of 5,000 members, and so many groups that the draws are not counted: against 1,500 draws, mid-p."""
    rng = np.random.default_rng(9)
    scores = np.where(rng.random(5000) < flagged, 1.0, 0.0) + 1e-9 * (rng.random(5000) < 0.5) * rng.normal(size=5000)
    draws = np.array([rng.permutation(5000)[:60] for _ in range(1500)])
    ranks = np.argsort(np.argsort(scores, kind="stable")) + 0.0
    for value in np.unique(scores):
        ranks[scores == value] = ranks[scores == value].mean()
    sums = np.sort(ranks[draws].sum(1))
    for at in (40, 150, 750, 1350, 1460):
        auc = (sums[at] - 60 * 59 / 2) / (60 * 4940)
        chosen = draws[np.argsort(ranks[draws].sum(1), kind="stable")[at]]
        curve = curve_of(scores[np.r_[chosen, np.setdiff1d(np.arange(5000), chosen)]], 60)
        assert curve.auc == pytest.approx(auc, abs=1e-9)
        expected = ((sums > sums[at] + 1e-6).mean() + (sums > sums[at] - 1e-6).mean()) / 2
        assert chance_above(*curve.groups, curve.auc) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(
    ("members", "others", "step", "trials"),
    [
        (3, 2000, None, 500), (5, 2000, None, 400), (10, 2000, None, 400), (20, 2000, None, 400), (20, 3, None, 500),
        (5, 5, None, 500), (50, 50, None, 500), (300, 300, None, 400), (3, 2000, 1, 500), (20, 2000, 1, 400),
        (20, 20, 1, 500),
    ],
)  # fmt: skip
def test_interval_covers_one_half_for_few_members_as_for_many(members, others, step, trials):
    """Scores that know nothing, plain and rounded to integers: 95 +- 2 %, and no more than 3 % missed on a side."""
    rng = np.random.default_rng(3)
    ends = np.array([curve_of(draw(rng, members, others, 0, step), members).auc_interval() for _ in range(trials)])
    above, below = int((ends[:, 0] > 0.5).sum()), int((ends[:, 1] < 0.5).sum())
    rate_is(trials - above - below, trials, 0.93, 0.97)
    assert max(above, below) <= binom.ppf(0.999, trials, 0.03)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.9])
@pytest.mark.parametrize("members", [3, 5, 10, 20])
def test_two_scores_only_are_never_called_more_than_chance_too_often(members, share):
    """Yes or no, a few of them yes: so few values are possible that 95 % cannot be met; it is not fallen short of."""
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        scores = (rng.random(members + 1000) < share) * 1.0
        low, high = curve_of(scores, members).auc_interval()
        hits += low <= 0.5 <= high
    rate_is(hits, 300, 0.94, 1.0)


def test_corrected_levels_hold_on_both_sides():
    """99 %: at most half a percent of null simulations are called above chance, and as many below."""
    rng = np.random.default_rng(5)
    for members in (5, 20):
        ends = np.array([curve_of(draw(rng, members, 500), members).auc_interval(0.99) for _ in range(600)])
        for missed in ((ends[:, 0] > 0.5).sum(), (ends[:, 1] < 0.5).sum()):
            assert missed <= binom.ppf(0.999, 600, 0.006)


@pytest.mark.parametrize("auc", [0.7, 0.9, 0.98])
@pytest.mark.parametrize(("members", "others"), [(10, 500), (50, 50)])
def test_interval_covers_the_truth_away_from_one_half(members, others, auc):
    rng, effect = np.random.default_rng(6), 2**0.5 * ndtri(auc)
    hits = 0
    for _ in range(500):
        low, high = curve_of(draw(rng, members, others, effect), members).auc_interval()
        hits += low <= auc <= high
    rate_is(hits, 500, 0.93, 0.98)


@pytest.mark.parametrize(("members", "others"), [(1, 1), (1, 7), (2, 1), (3, 3)])
def test_interval_of_very_few_is_in_order(members, others):
    rng = np.random.default_rng(7)
    for _ in range(50):
        curve = curve_of(np.round(rng.normal(size=members + others)), members)
        result = [curve.auc_interval(level) for level in (0.5, 0.95, 0.999)]
        lows, highs = [low for low, _ in result], [high for _, high in result]
        assert 0 <= lows[2] <= lows[1] <= lows[0] <= curve.auc <= highs[0] <= highs[1] <= highs[2] <= 1
    assert curve_of(np.zeros(members + others), members).auc_interval() == pytest.approx((0.5, 0.5), abs=1e-9)


def test_range_of_chance_is_that_of_the_rank_sum():
    """12 beside 2,000: the sum of 12 ranks."""
    low, high = chance_range(12, 2000)
    assert high - 0.5 == pytest.approx(1.959964 * (2013 / (12 * 12 * 2000)) ** 0.5, rel=1e-6)
    assert low + high == pytest.approx(1)
    assert chance_range(1, 5) == (0.0, 1.0)


def pair(seed, members=150, others=180, effects=(0.5, 0.5), shared=0.7, step=0.125):
    """Two correlated attacks on the same examples."""
    rng = np.random.default_rng(seed)
    inside = np.arange(members + others) < members
    common = rng.normal(size=len(inside))
    draws = [
        effect * inside + shared**0.5 * common + (1 - shared) ** 0.5 * rng.normal(size=len(inside))
        for effect in effects
    ]
    return *(torch.from_numpy(np.round(draw / step) * step) for draw in draws), torch.from_numpy(inside)


@pytest.mark.parametrize(("members", "others"), [(150, 180), (4, 90), (1, 9)])
def test_paired_test_is_that_of_its_definition(members, others):
    from scipy.stats import rankdata

    first, second, inside = pair(0, members, others)
    pairs = [pair_matrix(scores.numpy(), members) for scores in (first, second)]
    gap, total = pairs[0] - pairs[1], members + others
    auc = (pairs[0].mean() + pairs[1].mean()) / 2
    h = (auc / (2 - auc) + 2 * auc**2 / (1 + auc)) / 2 - auc**2
    c = np.mean((rankdata(first) - rankdata(second)) ** 2) / ((total**2 - 1) / 12)
    parts, degrees = [], []
    for side in (gap.mean(1), gap.mean(0)):
        degrees.append(PRIOR + len(side) - 1)
        parts.append((PRIOR * c * h + len(side) * side.var()) / degrees[-1] / len(side))
    freedom = sum(parts) ** 2 / sum(v * v / k for v, k in zip(parts, degrees, strict=True))
    result = delong_test(first, second, inside, 0.9)
    assert result["difference"] == pytest.approx(gap.mean(), abs=1e-12)
    assert result["difference"] == pytest.approx(roc(first, inside).auc - roc(second, inside).auc, abs=1e-12)
    assert result["z"] == pytest.approx(gap.mean() / sum(parts) ** 0.5, rel=1e-9)
    assert result["p"] == pytest.approx(2 * t.sf(abs(result["z"]), freedom), rel=1e-9)
    reach = t.ppf(0.95, freedom) * sum(parts) ** 0.5
    assert result["interval"] == pytest.approx([gap.mean() - reach, gap.mean() + reach], rel=1e-9)


@pytest.mark.parametrize(
    ("members", "others", "shared", "step", "trials"),
    [
        (3, 2000, 0.0, 1e-6, 250), (5, 500, 0.5, 1e-6, 400), (10, 500, 0.9, 1e-6, 400), (20, 2000, 0.5, 1e-6, 250),
        (5, 500, 0.5, 1.0, 400), (20, 500, 0.0, 1.0, 400), (5, 5, 0.0, 1e-6, 600), (150, 180, 0.7, 0.125, 500),
    ],
)  # fmt: skip
def test_equal_attacks_are_told_apart_at_the_stated_rate(members, others, shared, step, trials):
    """p < 0.05 in 5 +- 2 % of pairs of equally good attacks, and just where the interval leaves out 0."""
    low = 0
    for seed in range(trials):
        result = delong_test(*pair(seed, members, others, (0.0, 0.0), shared, step))
        low += result["p"] < 0.05
        assert (result["p"] < 0.05) == (not result["interval"][0] <= 0 <= result["interval"][1])
    rate_is(low, trials, 0.03, 0.07)


@pytest.mark.parametrize("cut", [0.0, 1.3])
@pytest.mark.parametrize("members", [3, 20])
def test_equal_answers_of_yes_and_no_are_not_told_apart_too_often(members, cut):
    low = 0
    for seed in range(400):
        first, second, inside = pair(seed, members, 800, (0.0, 0.0), 0.5, 1e-6)
        result = delong_test((first > cut).double(), (second > cut).double(), inside)
        low += result["p"] is not None and result["p"] < 0.05
    rate_is(low, 400, 0.0, 0.07)


def test_another_attack_is_found():
    result = delong_test(*pair(1, 2000, 2000, (0.8, 0.2)))
    assert result["p"] < 1e-6
    assert result["interval"][0] > 0


def test_the_same_attack_twice_has_no_test():
    first, _, members = pair(2)
    assert delong_test(first, first.exp(), members) == {"difference": 0.0, "interval": [0.0, 0.0], "z": None, "p": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b, m: (a[:-1], b, m), "first must have shape"),
        (lambda a, b, m: (a, b * torch.nan, m), "second must not hold NaN"),
        (lambda a, b, m: (a, b, m.long() + 1), "members must be bool, or hold 0 and 1 only"),
        (lambda a, b, m: (a, b, m | True), "members must hold members and non-members"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises((ValueError, TypeError), match=f"delong_test: {words}"):
        delong_test(*change(*pair(3)))
