"""group_norm_grad_samples against torch's backward of the norm and against the per-sample formula in torch."""

import pytest
import torch
from bench_group_norm_grad_norms import CASES, backward
from per_sample import BATCH, LAST

import kr_fast


def ours(x, grad_output, groups):
    return torch.cat(kr_fast.group_norm_grad_samples(x, grad_output, groups), 1)


def formula(x, grad_output, groups):
    """As Opacus takes it (grad_sample/group_norm.py)."""
    products = torch.nn.functional.group_norm(x, groups) * grad_output
    return torch.cat([products.sum((2, 3)), grad_output.sum((2, 3))], 1)


PROVIDERS = {"kr_fast": ours, "backward": backward, "formula": formula}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_group_norm_grad_samples(benchmark, case, provider, threads):
    benchmark.group = f"group_norm_grad_samples {case} {threads} threads"
    channels, side, groups = case
    x, grad_output = (torch.randn(BATCH, channels, side, side).contiguous(memory_format=LAST) for _ in range(2))
    run = PROVIDERS[provider]
    if provider != "backward":
        wanted = formula(x.double(), grad_output.double(), groups)
        error = float((run(x, grad_output, groups) - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-5
        benchmark.extra_info.update(error=error)
    benchmark.pedantic(run, args=(x, grad_output, groups), rounds=15, iterations=4, warmup_rounds=2)
    benchmark.extra_info.update(bytes=8 * x.numel())
