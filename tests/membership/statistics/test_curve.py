"""Curve: AUC, its interval and TPR at low FPR, by brute force and by simulation with fixed seeds."""

import numpy as np
import pytest
import torch

from kr_fast.membership import across_targets, aop, operating_point, roc, shadow_threshold


def draw(rng, members, others, effect=0.0, step=None):
    scores = np.concatenate([rng.normal(effect, 1, members), rng.normal(0, 1, others)])
    if step:
        scores = np.round(scores / step) * step
    return scores, np.arange(members + others) < members


def curve_of(scores, members):
    return roc(torch.from_numpy(scores), torch.from_numpy(members))


def test_interval_of_a_perfect_attack_has_a_width():
    """All 20 disjoint pairs in order: Clopper-Pearson's bound 0.025^(1/20), and its mirror image."""
    scores, members = np.arange(50.0), np.arange(50) >= 30
    assert curve_of(scores, members).auc == 1
    assert curve_of(scores, members).auc_interval() == pytest.approx((0.025 ** (1 / 20), 1.0))
    assert curve_of(-scores, members).auc_interval() == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))


def test_wider_level_gives_wider_interval():
    curve = curve_of(*draw(np.random.default_rng(2), 50, 50, 1.0))
    low, high = curve.auc_interval(0.99)
    assert low < curve.auc_interval(0.9)[0] < curve.auc < curve.auc_interval(0.9)[1] < high


def test_balanced_accuracy_by_all_thresholds():
    scores, members = draw(np.random.default_rng(3), 60, 40, 0.8, 0.25)
    best = max(((scores >= t)[members].mean() + (scores < t)[~members].mean()) / 2 for t in [*scores, np.inf])
    assert curve_of(scores, members).balanced_accuracy == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("fpr", [0.5, 0.1, 0.03, 0.001])
@pytest.mark.parametrize("step", [None, 0.5])
def test_tpr_is_the_largest_with_fpr_at_most_the_target(fpr, step):
    scores, members = draw(np.random.default_rng(4), 90, 100, 1.0, step)
    allowed = [t for t in [*scores, np.inf] if (scores >= t)[~members].mean() <= fpr]
    best = max((scores >= t)[members].mean() for t in allowed)
    result = curve_of(scores, members).tpr_at(fpr)
    assert result["tpr"] == best
    assert result["fpr"] <= fpr
    assert result["false_positives"] == round(result["fpr"] * 100)
    assert result["rule"] == "fpr <= target"
    assert result["interval"][0] <= result["tpr"] <= result["interval"][1]


def test_point_claim_needs_ten_false_positives():
    scores, members = draw(np.random.default_rng(5), 1000, 1000, 1.0)
    curve = curve_of(scores, members)
    assert curve.tpr_at(0.01)["point_claim"]  # 10 of 1000
    assert not curve.tpr_at(0.009)["point_claim"]
    assert not curve.tpr_at(0.0005)["point_claim"]  # no false positive is allowed: the interval remains
    assert curve.tpr_at(0.0005)["interval"][1] > 0


@pytest.mark.parametrize("fpr", [0.1, 0.01])
def test_tpr_interval_covers_the_truth(fpr):
    """Gaussian scores: the true TPR at the true threshold is known. The interval is conservative, never short."""
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = 1 - float(normal.cdf(normal.icdf(torch.tensor(1 - fpr)) - 1.0))
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(300):
        low, high = curve_of(*draw(rng, 400, 400, 1.0)).tpr_at(fpr)["interval"]
        hits += low <= truth <= high
    assert hits >= 285


def test_curve_runs_from_zero_to_one():
    curve = curve_of(*draw(np.random.default_rng(7), 5, 6))
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert (curve.positives, curve.negatives) == (5, 6)


@pytest.mark.parametrize("fpr", [0, 1, -0.1])
def test_target_fpr_must_be_a_rate(fpr):
    with pytest.raises(ValueError, match=r"fpr must be in \(0, 1\)"):
        curve_of(*draw(np.random.default_rng(8), 5, 5)).tpr_at(fpr)


def test_accuracy_over_privacy():
    assert aop(0.9, 0.5) == aop(0.9, 0.3) == 0.9  # an attack below chance does not earn a bonus
    assert aop(0.9, 1.0) == 0.9 / 4
    assert aop(0.8, 0.75) == pytest.approx(0.8 / 2.25)


def test_advantage_and_rules():
    scores, members = draw(np.random.default_rng(9), 200, 100, 1.0)
    curve = curve_of(scores, members)
    assert curve.advantage == pytest.approx(max(curve.tpr - curve.fpr), abs=1e-12)
    assert curve.tpr_at(0.05)["false_positives"] == 5
    strict = curve.tpr_at(0.05, rule="<")
    assert (strict["false_positives"], strict["rule"]) == (4, "fpr < target")
    between = curve.tpr_at(0.055, rule="interpolated")
    assert between["tpr"] == pytest.approx(np.interp(0.055, curve.fpr, curve.tpr))
    with pytest.raises(ValueError, match="rule must be one of <=, <, interpolated, got >"):
        curve.tpr_at(0.1, rule=">")


def test_interval_of_tpr_is_that_of_the_definition():
    """The vectorised interval against scipy.stats, one rate at a time."""
    from scipy.stats import beta, binom

    curve = curve_of(*draw(np.random.default_rng(10), 300, 250, 1.0, 0.25))
    rates = [0.5, 0.1, 0.02, 1e-4]
    low, high = curve.tpr_interval(rates)
    for i, rate in enumerate(rates):
        most, fewest = int(binom.ppf(1 - 0.0125, 250, rate)), int(binom.ppf(0.0125, 250, rate))
        above = [
            max([tp for tp, fp in zip(curve.tp, curve.fp, strict=True) if fp <= k], default=0)
            for k in (fewest - 1, most)
        ]
        expected = beta.ppf(0.0125, above[0], 301 - above[0]) if above[0] else 0.0
        assert low[i] == pytest.approx(expected, abs=1e-12)
        assert high[i] == pytest.approx(1.0 if above[1] == 300 else beta.ppf(0.9875, above[1] + 1, 300 - above[1]))


def test_precision_at_a_prior():
    curve = curve_of(*draw(np.random.default_rng(11), 2000, 2000, 1.0))
    result, at = curve.precision(0.1, 0.01), curve.tpr_at(0.01)
    assert result["ppv"] == pytest.approx(0.1 * at["tpr"] / (0.1 * at["tpr"] + 0.9 * at["fpr"]))
    assert result["interval"][0] < result["ppv"] < result["interval"][1]
    assert curve.precision(0.5, 1e-5)["point_claim"] is False
    with pytest.raises(ValueError, match=r"prior must be in \(0, 1\)"):
        curve.precision(1.0, 0.1)


def test_threshold_from_shadows_keeps_its_rate_on_the_target():
    """Chosen on others, the threshold's FPR holds in expectation; chosen on the data itself it cannot be above."""
    rng = np.random.default_rng(12)
    keep = rng.random((9, 2000)) < 0.5
    scores = torch.from_numpy(rng.normal(keep * 1.0, 1.0))
    keep = torch.from_numpy(keep)
    threshold = shadow_threshold(scores[1:], keep[1:], 0.05)
    result = operating_point(roc(scores[0], keep[0]), threshold)
    assert 0.03 < result["fpr"] < 0.07
    assert result["fpr_interval"][0] < 0.05 < result["fpr_interval"][1]
    assert result["tpr"] == float((scores[0][keep[0]] >= threshold).double().mean())
    tenth = result["ppv"]["0.1"]
    assert tenth["ppv"] == pytest.approx(0.1 * result["tpr"] / (0.1 * result["tpr"] + 0.9 * result["fpr"]))
    assert tenth["interval"][0] < tenth["ppv"] < tenth["interval"][1]
    nobody = operating_point(roc(scores[0], keep[0]), 1e9)
    assert (nobody["false_positives"], nobody["ppv"]["0.5"]["ppv"]) == (0, None)


def test_no_threshold_is_above_infinity():
    scores, members = [torch.inf, torch.inf, 1.0, 0.0], [True, False, True, False]
    assert roc(scores, members).threshold_at(0.6) == 1.0
    with pytest.raises(ValueError, match="Curve: scores must be finite for a threshold of an FPR of at most 0.1"):
        roc(scores, members).threshold_at(0.1)


def test_several_targets():
    rng = np.random.default_rng(13)
    keep = torch.from_numpy(rng.random((5, 300)) < 0.5)
    scores = torch.from_numpy(rng.normal(size=(5, 300))) + keep
    result = across_targets(scores, keep)
    each = [roc(row, held).auc for row, held in zip(scores, keep, strict=True)]
    assert result["auc"]["each"] == each
    assert result["auc"]["sd"] == pytest.approx(np.std(each, ddof=1))
    assert across_targets(scores[:1], keep[:1])["auc"]["sd"] is None
