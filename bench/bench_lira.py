"""LiRA for all targets (leave-one-out): our kernel against the authors' algorithm in numpy, target by target.

``pytest bench/bench_lira.py``. The numpy loop runs over 4 of the targets: its time for all is M / 4 times as long.
"""

import numpy as np
import pytest
import torch

from kr_fast.ops.lira import lira

EXAMPLES, MODELS, QUERIES, SAMPLED = 10_000, 128, 2, 4


def make():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(MODELS, EXAMPLES, generator=generator).argsort(0).argsort(0) < MODELS // 2
    return torch.randn(QUERIES, EXAMPLES, MODELS, generator=generator) + 2 * keep.T + 5, keep


def numpy_targets(phi, keep, targets):
    """The reference's online attack, per-example variance: sides as NaN-masked arrays, medians, densities."""
    phi, keep = phi.numpy().astype(np.float64), keep.numpy()
    rows = []
    for k in targets:
        others = np.arange(MODELS) != k
        shadows, inside, x = phi[:, :, others], keep[others].T[None], phi[:, :, k]
        ratio = 0
        for sign, mask in ((1, inside), (-1, ~inside)):
            part = np.where(mask, shadows, np.nan)
            deviation = np.nanstd(part, 2) + 1e-30
            ratio += sign * (-0.5 * ((x - np.nanmedian(part, 2)) / deviation) ** 2 - np.log(deviation))
        rows.append(ratio.mean(0))
    return np.stack(rows)


@pytest.mark.benchmark(group=f"lira N={EXAMPLES} M={MODELS} A={QUERIES}")
@pytest.mark.parametrize("provider", ["numpy, 4 targets", "kr_fast", "kr_fast fixed variance"])
def test_lira(benchmark, provider):
    phi, keep = make()
    variance = "fixed" if "fixed" in provider else "per_example"
    if variance == "per_example":
        wanted = numpy_targets(phi, keep, range(SAMPLED))
        assert np.allclose(lira(phi, keep)[0][:SAMPLED].numpy(), wanted, rtol=1e-9, atol=1e-9)
    if provider.startswith("numpy"):
        benchmark.pedantic(numpy_targets, (phi, keep, range(SAMPLED)), rounds=2)
        benchmark.extra_info["targets"] = SAMPLED
    else:
        benchmark.pedantic(lambda: lira(phi, keep, variance=variance), rounds=5, warmup_rounds=1)
        benchmark.extra_info["targets"] = MODELS
    benchmark.extra_info["threads"] = torch.get_num_threads()
