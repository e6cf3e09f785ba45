"""Thresholds of all targets from one sort, against a ROC for each of them.

One class of ten of 50,000 examples. The ROCs are of 4 of the targets: for all
they take M / 4 times as long.
"""

import pytest
import torch

from kr_fast.membership import roc
from kr_fast.ops.membership.best_threshold import best_threshold

COUNT, MODELS, SAMPLED = 5_000, 64, 4


def by_roc(values, held, targets):
    result = []
    for k in targets:
        others = torch.arange(MODELS) != k
        curve = roc(values[:, others].flatten(), held[:, others].flatten())
        result.append(float(curve.thresholds[int((curve.tpr - curve.fpr)[1:].argmax())]))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("provider", ["a ROC each, 4 targets", "kr_fast"])
def test_best_threshold(benchmark, provider):
    benchmark.group = f"best_threshold n={COUNT} M={MODELS}"
    generator = torch.Generator().manual_seed(0)
    held = torch.rand(COUNT, MODELS, generator=generator) < 0.5
    values = torch.randn(COUNT, MODELS, generator=generator, dtype=torch.float64) + held
    assert torch.equal(best_threshold(values, held)[:SAMPLED], by_roc(values, held, range(SAMPLED)))
    if provider == "kr_fast":
        benchmark.pedantic(best_threshold, (values, held), rounds=5, warmup_rounds=1)
    else:
        benchmark.pedantic(by_roc, (values, held, range(SAMPLED)), rounds=3)
    benchmark.extra_info["targets"] = MODELS if provider == "kr_fast" else SAMPLED
    benchmark.extra_info["threads"] = torch.get_num_threads()
