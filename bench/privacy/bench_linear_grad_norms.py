"""linear_grad_norms against torch's gradient over the batch (no norms) and against per-sample gradients by einsum."""

import pytest
import torch
from per_sample import LINEAR, check, norms

import kr_fast


def grad_weight(x, grad_output):
    return grad_output.flatten(0, -2).T @ x.flatten(0, -2)


def einsum(x, grad_output):
    return norms(torch.einsum("n...o,n...i->noi", grad_output, x))


PROVIDERS = {"kr_fast": kr_fast.linear_grad_norms, "grad_weight": grad_weight, "einsum": einsum}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", LINEAR)
@torch.inference_mode()
def test_linear_grad_norms(benchmark, name, provider, threads):
    benchmark.group = f"linear_grad_norms {name} {threads} threads"
    shape, inputs, outputs = LINEAR[name]
    x, grad_output = torch.randn(*shape, inputs), torch.randn(*shape, outputs)
    run = PROVIDERS[provider]
    if provider != "grad_weight":
        benchmark.extra_info.update(error=check(run(x, grad_output), einsum(x.double(), grad_output.double())))
    benchmark.pedantic(run, args=(x, grad_output), rounds=30, iterations=10, warmup_rounds=2)
