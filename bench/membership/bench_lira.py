"""LiRA for all targets (leave-one-out): our kernel against the authors' algorithm in numpy, target by target.

The numpy loop runs over 4 of the targets: its time for all is M / 4 times as long.
"""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kr_fast.backends.codes import VARIANCES
from kr_fast.ops.membership.lira import lira

EXAMPLES, MODELS, QUERIES, SAMPLED = 10_000, 128, 2, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(MODELS, EXAMPLES, generator=generator).argsort(0).argsort(0) < MODELS // 2
    return torch.randn(QUERIES, EXAMPLES, MODELS, generator=generator) + 2 * keep.T + 5, keep


def numpy_targets(phi, keep, targets):
    """Online, per-example variance, as in the published plot.py: lists by example, medians, scipy's densities.

    All shadows are used, where that code drops those beyond the least count; with NaN in the gaps that would be slower.
    """
    scores, keep = phi.permute(2, 1, 0).double().numpy(), keep.numpy()
    rows = []
    for k in targets:
        others = np.arange(MODELS) != k
        shadows, held = scores[others], keep[others]
        ratio = 0
        for sign, mask in ((1, held), (-1, ~held)):
            by_count = {}
            for n in range(EXAMPLES):
                by_count.setdefault(int(mask[:, n].sum()), []).append(n)
            density = np.empty((EXAMPLES, QUERIES))
            for group in by_count.values():
                part = np.array([shadows[mask[:, n], n, :] for n in group])
                density[group] = norm.logpdf(scores[k][group], np.median(part, 1), np.std(part, 1) + 1e-30)
            ratio = ratio + sign * density
        rows.append(ratio.mean(1))
    return np.stack(rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("provider", ["numpy, 4 targets", "kr_fast", *(f"kr_fast {name}" for name in VARIANCES[1:])])
def test_lira(benchmark, provider, device):
    benchmark.group = f"lira N={EXAMPLES} M={MODELS} A={QUERIES} {device}"
    phi, keep = make()
    if provider.startswith("numpy"):
        expected = numpy_targets(phi, keep, range(SAMPLED))
        result = lira(phi.to(device), keep.to(device))[0][:SAMPLED].cpu()
        assert np.allclose(result.numpy(), expected, rtol=1e-9, atol=1e-9)
        benchmark.pedantic(numpy_targets, (phi, keep, range(SAMPLED)), rounds=2)
    else:
        variance = provider.removeprefix("kr_fast").strip() or "per_example"
        phi, keep = phi.to(device), keep.to(device)
        benchmark.pedantic(
            lambda: lira(phi, keep, variance=variance), rounds=5, warmup_rounds=1
        )  # waits for the device
    benchmark.extra_info["targets"] = SAMPLED if provider.startswith("numpy") else MODELS
    benchmark.extra_info["threads"] = torch.get_num_threads()
