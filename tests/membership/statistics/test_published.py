"""Numbers that others have published, and small cases whose answer can be written down.

The vectors of the one-run bound stand in test_epsilon.py.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm

from kr_fast.membership import epsilon_clopper_pearson, epsilon_of_mu, gaussian_mu, lira, lira_carlini2021, roc
from kr_fast.ops.membership.membership_signals import membership_signals

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def shadows(*values):
    """(phi [1, N, 4], keep): the two values of each example belong to models that did not hold it."""
    phi = torch.zeros(1, len(values), 4, dtype=torch.float64)
    phi[0, :, 2:] = torch.tensor(values, dtype=torch.float64)
    phi[0, :, :2] = -phi[0, :, 2:]  # the models that held it answer with the negative
    return phi, (torch.arange(4) < 2)[:, None].expand(4, len(values))


def test_signals_of_tensorflow_privacy():
    """calculate_statistic of its advanced_mia: options "logit", "xe" and "conf with prob"."""
    result = membership_signals(
        torch.tensor([[1.0, 2.0, -3.0], [-1.0, 1.0, 0.0]]), torch.tensor([1, 2]), ("phi", "loss", "confidence")
    )
    assert result["phi"].tolist() == pytest.approx([0.98185009, -1.12692802], abs=2e-7)
    assert result["loss"].tolist() == pytest.approx([0.31817543, 1.40760596], abs=2e-7)
    assert result["confidence"].tolist() == pytest.approx([0.72747516, 0.24472847], abs=2e-7)


def test_lira_scores_of_tensorflow_privacy():
    """compute_score_lira, "out": two shadows an example. One that has none is filled in there and refused here."""
    phi, keep = shadows([-1, 1], [0, 2], [0, 20])
    target = torch.tensor([[[1.0], [0.0], [0.0]]])
    result = lira_carlini2021(phi, keep, variant="offline", target=target)[0]
    assert result.tolist() == pytest.approx([1.41893853, 1.41893853, 3.72152363], abs=1e-8)
    online = lira_carlini2021(shadows([-1, 1])[0], keep[:, :1], target=torch.ones(1, 1, 1))[0]
    assert online.tolist() == pytest.approx([0.0], abs=1e-12)
    # Ours keeps z and leaves the density's constant out: z^2 / 2 + ln s + ln(2 pi) / 2 is their score.
    z = lira(phi, keep, variant="offline", target=target)[0]
    assert z.tolist() == pytest.approx([1.0, -1.0, -1.0])
    spread = torch.tensor([1.0, 1.0, 10.0], dtype=torch.float64)
    assert (z.square() / 2 + spread.log() + HALF_LOG_TAU).tolist() == pytest.approx(result.tolist(), abs=1e-12)


def test_fixed_variance_of_tensorflow_privacy_is_within_examples():
    """Its fixed variance subtracts each example's centre, as "fixed" does here: (4 + 200) / 6 = 34."""
    phi, keep = shadows([-1, 1], [0, 2], [0, 20])
    target = torch.tensor([[[1.0], [0.0], [0.0]]])
    z = lira(phi, keep, variant="offline", variance="fixed", target=target)[0]
    theirs = z.square() / 2 + 0.5 * math.log(34) + HALF_LOG_TAU
    assert theirs.tolist() == pytest.approx([2.69682468, 2.69682468, 4.15270703], abs=1e-8)
    assert lira(phi, keep, variance="fixed", target=torch.zeros(1, 3, 1))[0].tolist() == pytest.approx([0, 0, 0])


def test_mean_over_queries_of_tensorflow_privacy():
    """Log-likelihoods of the queries are averaged, not their values: (1.41893853 + 3.72152363) / 2."""
    phi, keep = shadows([-1, 1])
    second, _ = shadows([0, 20])
    target = torch.tensor([[[1.0]], [[0.0]]])
    result = lira_carlini2021(torch.cat([phi, second]), keep, variant="offline", target=target)
    assert result.item() == pytest.approx(2.57023108, abs=1e-8)


def test_reference_offline_score_takes_low_values_for_members():
    """Two-sided, as the published code has it; the paper's one-sided test, ours, orders them by phi."""
    phi, keep = shadows([-1, 1])
    target = torch.tensor([[[-3.0, 0.0, 3.0]]])
    theirs = lira_carlini2021(phi, keep, variant="offline", target=target)[:, 0]
    assert theirs[0] == theirs[2] > theirs[1]
    ours = lira(phi, keep, variant="offline", target=target)[:, 0]
    assert ours[0] < ours[1] < ours[2]


# The curve of LiRA on a random forest in SACRO-ML's documentation (lira_example1_report.json), as how many members and
# non-members lie between its points, from high scores to low: 398 and 171.
SACRO_INSIDE = [
    4, 17, 0, 45, 0, 7, 0, 10, 0, 6, 0, 6, 0, 9, 0, 20, 0, 3, 0, 18, 0, 2, 0, 3, 0, 4, 0, 4, 0, 1, 0, 2, 0, 22, 0,
    1, 0, 11, 0, 3, 0, 5, 0, 3, 0, 6, 0, 1, 4, 1, 0, 6, 0, 1, 0, 1, 0, 1, 0, 1, 3, 0, 2, 1, 0, 3, 0, 3, 1, 0, 3, 2,
    1, 0, 3, 0, 4, 0, 7, 0, 1, 0, 4, 1, 1, 2, 0, 1, 0, 4, 2, 0, 3, 0, 1, 1, 1, 2, 0, 1, 2, 1, 0, 1, 0, 2, 3, 0, 2,
    0, 2, 1, 0, 1, 2, 3, 0, 3, 1, 0, 2, 2, 2, 0, 1, 0, 1, 0, 1, 0, 1, 14, 7, 3, 2, 0, 3, 0, 1, 0, 1, 0, 3, 0, 3, 0,
    4, 0, 1, 0, 1, 0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 4, 0, 3, 0, 1, 0, 3, 0, 2, 0, 2, 0, 2,
    0, 2, 0, 1, 0, 1, 0, 1, 0, 1,
]  # fmt: skip
SACRO_OUTSIDE = [
    0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 2, 0, 3, 0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 3, 0, 1, 0, 1,
    0, 2, 0, 2, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 3, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1,
    0, 1, 0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 2, 0, 2, 0, 0, 5, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 3, 0,
    0, 1, 0, 1, 0, 1, 0, 1, 2, 0, 0, 2, 3, 0, 1, 0, 2, 0, 2, 0, 6, 5, 0, 0, 1, 0, 1, 0, 1, 0, 3, 0, 1, 0, 1, 0, 3,
    0, 1, 0, 5, 0, 1, 0, 5, 0, 2, 0, 3, 0, 3, 0, 3, 0, 1, 0, 1, 0, 4, 0, 4, 0, 1, 0, 1, 0, 4, 0, 1, 0, 3, 0, 2, 0,
    8, 0, 1, 0, 1, 0, 4, 0,
]  # fmt: skip


def test_curve_of_sacro():
    """Its printed AUC is 100,876 half pairs; its TPRs follow the rule "fpr <= target" at these rates."""
    groups = torch.arange(len(SACRO_INSIDE)).neg().double()
    scores = torch.cat([groups.repeat_interleave(torch.tensor(side)) for side in (SACRO_INSIDE, SACRO_OUTSIDE)])
    curve = roc(scores, torch.arange(398 + 171) < 398)
    assert curve.auc == 100_876 / (2 * 398 * 171)
    assert round(curve.auc, 8) == 0.74110318
    result = [curve.tpr_at(fpr)["tpr"] for fpr in (0.2, 0.1, 0.01, 0.001)]
    assert result == pytest.approx([0.5477386934673367, 0.3969849246231156, 0.1658291457286432, 0.052763819095477386])


# Members' and non-members' scores of jax_privacy's cases of ties; counts at each distinct score written by hand.
TIES = {
    "between": ([1.5, 2.5, 0.5, 3.5], [0, 3, 2, 1], [1, 1, 2, 2, 3, 3, 4, 4], [0, 1, 1, 2, 2, 3, 3, 4], 10 / 16),
    "convex": ([0, 1, 1, 2], [0, 0, 1, 1], [1, 3, 4], [0, 2, 4], 11 / 16),
    "not convex": ([0, 0, 1, 2], [0, 1, 1, 1], [1, 2, 4], [0, 3, 4], 7.5 / 16),
    "all tied": ([0, 0, 0, 0], [0, 0, 0, 0], [4], [4], 0.5),
}


@pytest.mark.parametrize("name", TIES)
def test_ties(name):
    inside, outside, tp, fp, auc = TIES[name]
    curve = roc(torch.tensor([*inside, *outside], dtype=torch.float64), torch.arange(8) < 4)
    assert (curve.tp.tolist(), curve.fp.tolist(), curve.auc) == (tp, fp, auc)


def test_the_curve_is_not_its_convex_hull():
    """Hulls answer 0.573 on null data of 50 + 50; ours is the Mann-Whitney count, unbiased, and may fall below 0.5."""
    rng = np.random.default_rng(0)
    result = [roc(torch.from_numpy(rng.normal(size=100)), torch.arange(100) < 50).auc for _ in range(200)]
    assert abs(np.mean(result) - 0.5) < 3 * 0.058 / 200**0.5  # sd of one: sqrt(101 / (12 * 2500))
    assert min(result) < 0.45
    worst = roc(torch.cat([torch.zeros(30), torch.ones(15)]), torch.arange(45) < 30)
    assert [worst.tpr_at(fpr)["tpr"] for fpr in (0.1, 0.5, 0.9)] == [0, 0, 0]


def normal_scores(mu, count):
    """Scores that are exactly normal in their quantiles: half members at mu, half not at 0."""
    quantiles = norm.ppf((np.arange(count // 2) + 0.5) / (count // 2))
    return torch.from_numpy(np.concatenate([quantiles + mu, quantiles])), torch.arange(count) < count // 2


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_bound_at_a_stated_threshold_by_the_beta_quantiles(threshold):
    scores, members = normal_scores(1.0, 400)
    tp, fp = (int((scores[side] >= threshold).sum()) for side in (members, ~members))
    tpr, fpr = beta.ppf(0.05, tp, 201 - tp), beta.ppf(0.95, fp + 1, 200 - fp)
    expected = max(0.0, math.log(tpr / fpr), math.log((1 - fpr) / (1 - tpr)))
    assert epsilon_clopper_pearson(scores, members, level=0.9, thresholds=(threshold,)) == pytest.approx(expected)


@pytest.mark.parametrize("mu", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("strategy", ["bonferroni", "split"])
def test_bounds_are_tight_for_the_gaussian_mechanism(mu, strategy):
    """A million scores, delta = 0.1: within a fifth of the truth, and below it."""
    scores, members = normal_scores(mu, 1_000_000)
    truth = epsilon_of_mu(mu, 0.1)
    result = epsilon_clopper_pearson(scores, members, delta=0.1, level=0.8, strategy=strategy)
    assert 0.8 * truth <= result <= truth
    assert 0.97 * mu <= gaussian_mu(scores, members) <= mu
