"""Exact ROC, AUC, DeLong interval and TPR at low FPR of 50,000 scores: ours against scikit-learn.

scikit-learn has no interval: its row does less work.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from kr_fast.membership import roc

COUNT = 50_000


def make(kind):
    generator = torch.Generator().manual_seed(0)
    members = torch.rand(COUNT, generator=generator) < 0.5
    scores = torch.randn(COUNT, dtype=torch.float64, generator=generator) + 0.5 * members
    return (scores * 100).round() if kind == "ties" else scores, members


def ours(scores, members):
    curve = roc(scores, members)
    return curve.auc, curve.auc_interval(), [curve.tpr_at(fpr) for fpr in (0.1, 0.01, 0.001, 0.0001)]


def sklearns(scores, members):
    fpr, tpr, _ = roc_curve(members, scores)
    return roc_auc_score(members, scores), [
        tpr[np.searchsorted(fpr, at, side="right") - 1] for at in (0.1, 0.01, 0.001, 0.0001)
    ]


@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize("provider", ["scikit-learn", "kr_fast"])
def test_roc(benchmark, provider, kind):
    scores, members = make(kind)
    plain = scores.numpy(), members.numpy()
    result, expected = ours(scores, members), sklearns(*plain)
    assert abs(result[0] - expected[0]) < 1e-12
    assert np.allclose([row["tpr"] for row in result[2]], expected[1], atol=1e-12)
    benchmark.group = f"roc N={COUNT} {kind}"
    if provider == "kr_fast":
        benchmark(ours, scores, members)
    else:
        benchmark(sklearns, *plain)
