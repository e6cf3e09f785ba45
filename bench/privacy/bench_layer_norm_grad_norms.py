"""layer_norm_grad_norms against the per-sample formula in torch."""

import pytest
import torch
from per_sample import BATCH, check

import kr_fast

CASES = [(49, 64), (196, 128), (1, 512)]  # positions, width


def formula(x, grad_output, width):
    """As Opacus takes it (grad_sample/layer_norm.py)."""
    products = torch.nn.functional.layer_norm(x, (width,)) * grad_output
    return torch.cat([products.sum(1), grad_output.sum(1)], 1).norm(dim=1)


PROVIDERS = {"kr_fast": kr_fast.layer_norm_grad_norms, "formula": formula}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_layer_norm_grad_norms(benchmark, case, provider, threads):
    benchmark.group = f"layer_norm_grad_norms {case} {threads} threads"
    x, grad_output = torch.randn(BATCH, *case), torch.randn(BATCH, *case)
    run = PROVIDERS[provider]
    error = check(run(x, grad_output, case[1]), formula(x.double(), grad_output.double(), case[1]))
    benchmark.pedantic(run, args=(x, grad_output, case[1]), rounds=15, iterations=4, warmup_rounds=2)
    benchmark.extra_info.update(error=error, bytes=8 * x.numel())
