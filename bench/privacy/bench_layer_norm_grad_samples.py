"""layer_norm_grad_samples against the per-sample formula in torch."""

import pytest
import torch
from bench_layer_norm_grad_norms import CASES
from per_sample import BATCH

import kr_fast


def ours(x, grad_output, width):
    return torch.cat(kr_fast.layer_norm_grad_samples(x, grad_output, width), 1)


def formula(x, grad_output, width):
    """As Opacus takes it (grad_sample/layer_norm.py)."""
    products = torch.nn.functional.layer_norm(x, (width,)) * grad_output
    return torch.cat([products.sum(1), grad_output.sum(1)], 1)


PROVIDERS = {"kr_fast": ours, "formula": formula}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_layer_norm_grad_samples(benchmark, case, provider, threads):
    benchmark.group = f"layer_norm_grad_samples {case} {threads} threads"
    x, grad_output = torch.randn(BATCH, *case), torch.randn(BATCH, *case)
    run = PROVIDERS[provider]
    wanted = formula(x.double(), grad_output.double(), case[1])
    error = float((run(x, grad_output, case[1]) - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-5
    benchmark.pedantic(run, args=(x, grad_output, case[1]), rounds=15, iterations=4, warmup_rounds=2)
    benchmark.extra_info.update(error=error, bytes=8 * x.numel())
