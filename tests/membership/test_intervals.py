"""Paired DeLong test and bootstrap: definitions, and coverage by simulation with fixed seeds."""

import numpy as np
import pytest
import torch

from kr_fast.membership import bootstrap, delong_test, roc
from kr_fast.membership.intervals import clopper_pearson, holm


def pair(seed, members=150, others=180, effects=(0.5, 0.5), shared=0.7):
    """Two correlated attacks on the same examples."""
    rng = np.random.default_rng(seed)
    inside = np.arange(members + others) < members
    common = rng.normal(size=len(inside))
    draws = [
        effect * inside + shared * common + (1 - shared**2) ** 0.5 * rng.normal(size=len(inside)) for effect in effects
    ]
    return *(torch.from_numpy(np.round(draw * 8) / 8) for draw in draws), torch.from_numpy(inside)


def test_variance_is_delongs_by_the_pair_matrix():
    first, second, members = pair(0)
    kernels = []
    for scores in (first, second):
        inside, outside = scores[members][:, None], scores[~members][None]
        kernels.append(((inside > outside).double() + 0.5 * (inside == outside)).numpy())
    gap = kernels[0] - kernels[1]
    spread = gap.mean(1).var(ddof=1) / gap.shape[0] + gap.mean(0).var(ddof=1) / gap.shape[1]
    found = delong_test(first, second, members)
    assert found["difference"] == pytest.approx(gap.mean(), abs=1e-12)
    assert found["z"] == pytest.approx(gap.mean() / spread**0.5, rel=1e-9)
    assert found["interval"][1] - found["difference"] == pytest.approx(1.959963985 * spread**0.5, rel=1e-6)
    assert found["difference"] == pytest.approx(roc(first, members).auc - roc(second, members).auc, abs=1e-12)


def test_equal_attacks_are_told_apart_at_the_stated_rate():
    """1,000 pairs of equally good attacks: 5 +- 2 % have p < 0.05 (3 sigma is 2 %)."""
    low = sum(delong_test(*pair(seed))["p"] < 0.05 for seed in range(1000))
    assert 30 <= low <= 70


def test_another_attack_is_found():
    found = delong_test(*pair(1, 2000, 2000, (0.8, 0.2)))
    assert found["p"] < 1e-6
    assert found["interval"][0] > 0


def test_the_same_attack_twice_has_no_test():
    first, _, members = pair(2)
    assert delong_test(first, first.exp(), members) == {"difference": 0.0, "interval": [0.0, 0.0], "z": None, "p": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b, m: (a[:-1], b, m), "first must have shape"),
        (lambda a, b, m: (a, b * torch.nan, m), "second must not hold NaN"),
        (lambda a, b, m: (a, b, m.long()), "members must be bool"),
        (lambda a, b, m: (a, b, m | True), "members must be bool and hold"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises((ValueError, TypeError), match=f"delong_test: {words}"):
        delong_test(*change(*pair(3)))


def test_bootstrap_covers_as_delong_does():
    """Same width within a tenth, and TPR at a low rate wider than Clopper-Pearson's at the observed threshold."""
    rng = np.random.default_rng(4)
    members = torch.arange(4000) < 2000
    curve = roc(torch.from_numpy(rng.normal(size=4000)) + members, members)
    found = bootstrap(curve, replicates=2000, fprs=(0.01, 0.1), seed=5)
    low, high = curve.auc_interval()
    assert found["auc"][0] == pytest.approx(low, abs=0.1 * (high - low))
    assert found["auc"][1] == pytest.approx(high, abs=0.1 * (high - low))
    at = curve.tpr_at(0.01)
    naive = clopper_pearson(int(at["tpr"] * 2000), 2000, 0.025)
    assert found["tpr"][0.01][1] - found["tpr"][0.01][0] > 1.5 * (naive[1] - naive[0])
    assert found["tpr"][0.01][0] < at["tpr"] < found["tpr"][0.01][1]


def test_clopper_pearson_at_the_ends():
    assert clopper_pearson(0, 20, 0.05) == (0.0, pytest.approx(1 - 0.05 ** (1 / 20)))
    assert clopper_pearson(20, 20, 0.05) == (pytest.approx(0.05 ** (1 / 20)), 1.0)


def test_holm_by_hand():
    """0.01 x 4; 0.02 x 3, 0.03 x 2 raised to the one before; 0.6 x 1. A test that was not made does not count."""
    assert holm([0.03, None, 0.01, 0.6, 0.02]) == pytest.approx([0.06, None, 0.04, 0.6, 0.06])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([None]) == [None]
    assert holm([]) == []


def test_holm_errs_in_few_families():
    """1,000 families of five true null hypotheses: one is called false in at most 5 % (6.5 with the error of that)."""
    p = np.random.default_rng(0).random((1000, 5))
    assert sum(min(holm(row.tolist())) <= 0.05 for row in p) <= 65
    assert (p.min(1) <= 0.05).sum() > 150
