"""1,000 bootstraps of AUC and three TPRs of 50,000 scores: weights on one sort against numpy, replicate by replicate.

numpy resamples and sorts anew; its row does 10 of the 1,000.
"""

import numpy as np
import pytest
import torch

from kr_fast.membership import bootstrap, roc

COUNT, REPLICATES, SAMPLED, FPRS = 50_000, 1000, 10, (0.1, 0.01, 0.001)


def make():
    generator = torch.Generator().manual_seed(0)
    members = torch.rand(COUNT, generator=generator) < 0.5
    return torch.randn(COUNT, dtype=torch.float64, generator=generator) + 0.5 * members, members


def numpys(scores, members, replicates):
    rng = np.random.default_rng(0)
    inside, outside = scores[members], scores[~members]
    rows = []
    for _ in range(replicates):
        high, low = rng.choice(inside, len(inside)), np.sort(rng.choice(outside, len(outside)))
        auc = (np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")).mean() / 2 / len(low)
        rows.append([auc, *((high > low[-1 - int(fpr * len(low))]).mean() for fpr in FPRS)])
    return np.array(rows)


@pytest.mark.benchmark(group=f"bootstrap N={COUNT}")
@pytest.mark.parametrize("provider", ["numpy, 10 replicates", "kr_fast, 1000 replicates"])
def test_bootstrap(benchmark, provider):
    scores, members = make()
    curve = roc(scores, members)
    ours, theirs = bootstrap(curve, replicates=REPLICATES, fprs=FPRS), numpys(scores.numpy(), members.numpy(), 200)
    width = ours["auc"][1] - ours["auc"][0]
    assert np.allclose(np.quantile(theirs[:, 0], [0.025, 0.975]), ours["auc"], atol=0.25 * width)
    if provider.startswith("numpy"):
        benchmark.pedantic(numpys, (scores.numpy(), members.numpy(), SAMPLED), rounds=3)
    else:
        benchmark.pedantic(lambda: bootstrap(curve, replicates=REPLICATES, fprs=FPRS), rounds=5, warmup_rounds=1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
