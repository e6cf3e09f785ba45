"""group_norm_grad_norms against torch's backward of the norm and against the per-sample formula in torch."""

import pytest
import torch
from per_sample import BATCH, LAST, check

import kr_fast

CASES = [(16, 28, 8), (32, 14, 8), (64, 7, 8), (32, 28, 8), (64, 28, 8), (64, 14, 8)]  # channels, side, groups


def backward(x, grad_output, groups):
    """What a step without privacy takes for the weight, the bias and x: without x's, torch crashes in channels_last."""
    (rows, channels), pixels = x.shape[:2], x[0, 0].numel()
    _, mean, rstd = torch.native_group_norm(x, None, None, rows, channels, pixels, groups, 1e-5)
    sizes = rows, channels, pixels, groups
    weight = x.new_ones(channels)
    return torch.ops.aten.native_group_norm_backward(grad_output, x, mean, rstd, weight, *sizes, [True] * 3)


def formula(x, grad_output, groups):
    """As Opacus takes it (grad_sample/group_norm.py)."""
    products = torch.nn.functional.group_norm(x, groups) * grad_output
    return torch.cat([products.sum((2, 3)), grad_output.sum((2, 3))], 1).norm(dim=1)


PROVIDERS = {"kr_fast": kr_fast.group_norm_grad_norms, "backward": backward, "formula": formula}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_group_norm_grad_norms(benchmark, case, provider, threads):
    benchmark.group = f"group_norm_grad_norms {case} {threads} threads"
    channels, side, groups = case
    x, grad_output = (torch.randn(BATCH, channels, side, side).contiguous(memory_format=LAST) for _ in range(2))
    run = PROVIDERS[provider]
    if provider != "backward":
        error = check(run(x, grad_output, groups), formula(x.double(), grad_output.double(), groups))
        benchmark.extra_info.update(error=error)
    benchmark.pedantic(run, args=(x, grad_output, groups), rounds=15, iterations=4, warmup_rounds=2)
    benchmark.extra_info.update(bytes=8 * x.numel())
