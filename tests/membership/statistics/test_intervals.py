"""Bootstrap, Clopper-Pearson and Holm: definitions, and coverage by simulation with fixed seeds."""

import numpy as np
import pytest
import torch

from kr_fast.membership import bootstrap, roc
from kr_fast.membership.statistics.intervals import clopper_pearson, holm


def test_bootstrap_covers_as_delong_does():
    """Same width within a tenth, and TPR at a low rate wider than Clopper-Pearson's at the observed threshold."""
    rng = np.random.default_rng(4)
    members = torch.arange(4000) < 2000
    curve = roc(torch.from_numpy(rng.normal(size=4000)) + members, members)
    result = bootstrap(curve, replicates=2000, fprs=(0.01, 0.1), seed=5)
    low, high = curve.auc_interval()
    assert result["auc"][0] == pytest.approx(low, abs=0.1 * (high - low))
    assert result["auc"][1] == pytest.approx(high, abs=0.1 * (high - low))
    at = curve.tpr_at(0.01)
    naive = clopper_pearson(int(at["tpr"] * 2000), 2000, 0.025)
    assert result["tpr"][0.01][1] - result["tpr"][0.01][0] > 1.5 * (naive[1] - naive[0])
    assert result["tpr"][0.01][0] < at["tpr"] < result["tpr"][0.01][1]


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
