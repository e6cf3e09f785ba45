"""LiRA for all targets (leave-one-out): part of ``kr-fast bench audit``, and our other variances."""

import pytest
import torch
from shared_cases import DEVICE, pairs, run

from kr_fast.backends.codes import VARIANCES
from kr_fast.benchmarks.cases.audit import shadow_signals
from kr_fast.ops.membership.lira import lira


@pytest.mark.parametrize(("case", "provider"), pairs("audit", "lira"))
def test_lira(benchmark, case, provider):
    run(benchmark, case, provider, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("variance", VARIANCES)
def test_variances(benchmark, variance):
    phi, keep = (tensor.to(DEVICE) for tensor in shadow_signals())
    benchmark.group = f"lira, variances, {DEVICE}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(lambda: lira(phi, keep, variance=variance), rounds=5, warmup_rounds=1)  # waits for the device
