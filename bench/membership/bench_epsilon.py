"""Epsilon bounds of 50,000 scores: all thresholds, a split, and one run, against a loop over the thresholds.

The loop (Clopper-Pearson by scipy.stats at every distinct score) does 200 of them.
"""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from kr_fast.membership import epsilon_clopper_pearson, epsilon_one_run, gaussian_mu, roc

COUNT, SAMPLED = 50_000, 200


def make():
    generator = torch.Generator().manual_seed(0)
    members = torch.arange(COUNT) % 2 == 0
    return torch.randn(COUNT, dtype=torch.float64, generator=generator) + members, members


def loop(scores, members):
    curve = roc(scores, members)
    best, error = 0.0, 0.05 / 2 / len(curve.tp)
    for i in np.linspace(0, len(curve.tp) - 1, SAMPLED).astype(int):
        tp, fp = int(curve.tp[i]), int(curve.fp[i])
        low = beta.ppf(error, tp, curve.positives - tp + 1) if tp else 0.0
        high = beta.ppf(1 - error, fp + 1, curve.negatives - fp) if fp < curve.negatives else 1.0
        best = max(best, np.log(low / high) if low > 0 else 0.0)
    return best


PROVIDERS = {
    f"scipy.stats, {SAMPLED} thresholds": loop,
    "bonferroni": epsilon_clopper_pearson,
    "split": lambda s, m: epsilon_clopper_pearson(s, m, strategy="split"),
    "multi_split": lambda s, m: epsilon_clopper_pearson(s, m, strategy="multi_split"),
    "gaussian_mu": gaussian_mu,
    "one run": epsilon_one_run,
    "one run, delta = 1e-5": lambda s, m: epsilon_one_run(s, m, delta=1e-5),
}


@pytest.mark.benchmark(group=f"epsilon N={COUNT}")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_epsilon(benchmark, provider):
    scores, members = make()
    run = PROVIDERS[provider]
    assert run(scores, members) > 0
    benchmark.pedantic(run, (scores, members), rounds=5, warmup_rounds=1)
