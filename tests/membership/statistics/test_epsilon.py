"""Epsilon bounds: published values, validity on null data and on mechanisms whose epsilon is known."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kr_fast.membership import epsilon_clopper_pearson, epsilon_of_mu, epsilon_one_run, gaussian_mu, roc
from kr_fast.membership.statistics.bounds import count_grid, epsilon_of_rates, one_run_bound, one_run_p
from kr_fast.membership.statistics.epsilon import STRATEGIES


def gaussian(seed, mu, count):
    """Scores of an optimal attack on a mu-Gaussian-DP mechanism, half members."""
    members = torch.arange(count) % 2 == 0
    return torch.from_numpy(np.random.default_rng(seed).normal(size=count)) + mu * members, members


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((1000, 500, 400, 1e-5), 1.1980),
        ((1000, 100, 99, 1e-5), 3.0028),
        ((100, 100, 90, 0.0), 1.6308),
        ((100, 100, 100, 0.0), 3.4930),
        ((1000, 1000, 1000, 0.0), 5.8091),
    ],
)
def test_one_run_values(case, expected):
    """Vectors made with the published algorithm of appendix D; the last two are logit(p^(1/m)) in closed form."""
    assert one_run_bound(*case, 0.05) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("case", [(300, 120, 100, 1e-4), (40, 40, 33, 1e-3), (50, 9, 1, 1e-2), (50, 9, 0, 1e-2)])
def test_one_run_p_value_by_the_published_loop(case):
    from scipy.stats import binom

    m, r, v, delta = case
    for epsilon in (0.0, 0.5, 2.0):
        q = 1 / (1 + math.exp(-epsilon))
        total, alpha = 0.0, 0.0
        for i in range(1, v + 1):
            total += binom.pmf(v - i, r, q)
            alpha = max(alpha, total / i)
        expected = min(1.0, binom.sf(v - 1, r, q) + 2 * m * delta * alpha)
        assert one_run_p(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_null_scores_are_not_accused(strategy):
    """400 attacks that know nothing: a bound above 0 in at most 5 %."""
    false = sum(epsilon_clopper_pearson(*gaussian(seed, 0.0, 400), strategy=strategy) > 0 for seed in range(400))
    assert false <= 20


def test_null_scores_are_not_accused_by_one_run_or_mu():
    assert sum(epsilon_one_run(*gaussian(seed, 0.0, 400)) > 0 for seed in range(400)) <= 20
    assert sum(gaussian_mu(*gaussian(seed, 0.0, 400)) > 0 for seed in range(400)) <= 20


def test_null_scores_with_ties_are_not_accused():
    def tied(seed):
        scores, members = gaussian(seed, 0.0, 400)
        return (2 * scores).round(), members

    assert sum(epsilon_clopper_pearson(*tied(seed)) > 0 for seed in range(400)) <= 20


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_bounds_hold_for_the_gaussian_mechanism(mu):
    """200 runs each: above the truth in at most 5 %."""
    delta = 1e-3
    truth = epsilon_of_mu(mu, delta)
    above = {"mu": 0, "bonferroni": 0, "split": 0, "multi_split": 0}
    for seed in range(200):
        scores, members = gaussian(seed, mu, 1000)
        above["mu"] += gaussian_mu(scores, members) > mu
        for strategy in STRATEGIES:
            above[strategy] += epsilon_clopper_pearson(scores, members, delta=delta, strategy=strategy) > truth
    assert max(above.values()) <= 10


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_large_sample_comes_close_to_the_truth(mu):
    """40 runs of 100,000: no more than 2 above the truth, all of them above 70 % of it."""
    truth, above = epsilon_of_mu(mu, 1e-5), 0
    for seed in range(40):
        scores, members = gaussian(seed, mu, 100_000)
        bound = gaussian_mu(scores, members)
        assert bound >= 0.85 * mu
        assert epsilon_of_mu(bound, 1e-5) >= 0.7 * truth
        above += bound > mu
    assert above <= 2
    assert 0 < epsilon_clopper_pearson(scores, members, delta=1e-5) < truth


def shares_of_truth(mu, delta, count, runs):
    """The Clopper-Pearson bound over the truth, by run from low to high."""
    truth = epsilon_of_mu(mu, delta)
    return sorted(epsilon_clopper_pearson(*gaussian(seed, mu, count), delta=delta) / truth for seed in range(runs))


@pytest.mark.parametrize(
    ("mu", "delta", "count", "runs"),
    [(0.5, 1e-2, 100_000, 40), (1.0, 1e-2, 100_000, 40), (2.0, 1e-2, 100_000, 40), (1.0, 1e-3, 100_000, 40),
     (0.5, 1e-3, 1_000_000, 10), (1.0, 1e-3, 1_000_000, 10), (2.0, 1e-3, 1_000_000, 10)],
)  # fmt: skip
def test_clopper_pearson_comes_close_where_there_are_examples(mu, delta, count, runs):
    """Where examples lie beyond the best threshold: every run above 70 % of the truth, no more than 5 % above it."""
    result = shares_of_truth(mu, delta, count, runs)
    assert result[0] >= 0.7
    assert sum(share > 1 for share in result) <= runs / 20


@pytest.mark.parametrize(("mu", "median"), [(0.5, 0.54), (1.0, 0.57), (2.0, 0.49)])
def test_clopper_pearson_at_a_small_delta_is_what_the_docs_say(mu, median):
    """delta = 1e-5 puts the best threshold where 100,000 examples have 0.6, 0.03 and 0.00005 non-members."""
    result = shares_of_truth(mu, 1e-5, 100_000, 20)
    assert result[9] == pytest.approx(median, abs=0.03)
    assert result[-1] < 0.7


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_one_run_bound_holds_for_randomised_response(epsilon):
    """200 runs of a mechanism whose epsilon is exact: above the truth in at most 5 %, for one count and for several."""
    above = {None: 0, 600: 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        members = torch.from_numpy(rng.random(600) < 0.5)
        answer = members ^ torch.from_numpy(rng.random(600) > math.exp(epsilon) / (1 + math.exp(epsilon)))
        noisy = answer.double() + 1e-3 * torch.from_numpy(rng.random(600))  # no ties
        for guesses in above:
            above[guesses] += epsilon_one_run(noisy, members, guesses=guesses) > epsilon
    assert max(above.values()) <= 10


def test_randomised_response_is_found_by_every_bound():
    """Right with probability e / (1 + e): epsilon is 1 exactly, and the score is one bit."""
    rng = np.random.default_rng(2)
    members = torch.from_numpy(rng.random(20_000) < 0.5)
    answer = members ^ torch.from_numpy(rng.random(20_000) > math.e / (1 + math.e))
    for strategy in STRATEGIES:
        assert 0.7 < epsilon_clopper_pearson(answer.double(), members, strategy=strategy) <= 1
    assert 0.85 < epsilon_clopper_pearson(answer.double(), members, thresholds=(0.5,)) <= 1
    assert 0.85 < epsilon_one_run(answer.double(), members, guesses=20_000) <= 1


def test_epsilon_of_mu_inverts_delta():
    for mu, delta in ((0.3, 1e-5), (1.0, 1e-5), (3.0, 0.01)):
        e = epsilon_of_mu(mu, delta)
        assert norm.cdf(-e / mu + mu / 2) - math.exp(e) * norm.cdf(-e / mu - mu / 2) == pytest.approx(delta, rel=1e-6)
    assert epsilon_of_mu(0.0, 1e-5) == 0.0
    assert epsilon_of_mu(1e-6, 1e-3) == 0.0


def test_rates_hold_together_for_all_thresholds():
    """The truth of every threshold is known: both bands miss somewhere in at most 5 % of 300 runs."""
    missed = 0
    for seed in range(300):
        scores, members = gaussian(seed, 1.0, 600)
        curve = roc(scores, members)
        low, high = curve.simultaneous_rates()
        at = np.searchsorted(curve.fp, count_grid(curve.negatives)[:-1], side="right")
        above = np.append(curve.thresholds, -np.inf)[at]  # flagged: strictly above this score
        missed += bool((norm.sf(above) > high).any() or (norm.sf(above - 1.0) < low).any())
    assert missed <= 15


def test_count_grid():
    grid = count_grid(1000)
    assert grid[0] == 0
    assert grid[-1] == 1000
    assert set(range(11)) <= set(grid.tolist())
    assert np.array_equal(grid, 1000 - grid[::-1])
    assert count_grid(1).tolist() == [0, 1]
    assert len(count_grid(25_000)) < 200


def test_rates_by_hand():
    assert epsilon_of_rates(np.array([0.5]), np.array([0.1]))[0] == pytest.approx(math.log(5))
    assert epsilon_of_rates(np.array([0.9]), np.array([0.5]))[0] == pytest.approx(math.log(5))  # by the other side
    assert epsilon_of_rates(np.array([0.0, 1.0, 0.2]), np.array([0.0, 1.0, 0.5])).tolist() == [0, 0, 0]


SCORES, MEMBERS = gaussian(0, 1.0, 100)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: epsilon_clopper_pearson(SCORES, MEMBERS, delta=1.0), r"delta must be in \[0, 1\), got 1.0"),
        (lambda: epsilon_clopper_pearson(SCORES, MEMBERS, level=0), r"level must be in \(0, 1\)"),
        (lambda: epsilon_clopper_pearson(SCORES, MEMBERS, strategy="max"), "strategy must be one of bonferroni"),
        (lambda: epsilon_clopper_pearson(SCORES, MEMBERS, thresholds=()), "thresholds must hold at least one"),
        (lambda: epsilon_one_run(SCORES, MEMBERS, guesses=101), r"guesses must be in \[1, 100\], got 101"),
        (lambda: epsilon_one_run(SCORES, torch.arange(100) < 10), "members must be about half of the examples"),
        (lambda: epsilon_of_mu(1.0, 0.0), r"delta must be in \(0, 1\)"),
        (lambda: gaussian_mu(SCORES * torch.nan, MEMBERS), "scores must not hold NaN"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
