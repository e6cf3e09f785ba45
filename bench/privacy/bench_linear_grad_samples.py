"""linear_grad_samples against einsum."""

import pytest
import torch
from per_sample import LINEAR, check

import kr_fast


def ours(x, grad_output):
    return kr_fast.linear_grad_samples(x, grad_output)[0]


def einsum(x, grad_output):
    return torch.einsum("n...o,n...i->noi", grad_output, x)


PROVIDERS = {"kr_fast": ours, "einsum": einsum}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", LINEAR)
@torch.inference_mode()
def test_linear_grad_samples(benchmark, name, provider, threads):
    benchmark.group = f"linear_grad_samples {name} {threads} threads"
    shape, inputs, outputs = LINEAR[name]
    x, grad_output = torch.randn(*shape, inputs), torch.randn(*shape, outputs)
    run = PROVIDERS[provider]
    benchmark.extra_info.update(error=check(run(x, grad_output), einsum(x.double(), grad_output.double())))
    benchmark.pedantic(run, args=(x, grad_output), rounds=30, iterations=10, warmup_rounds=2)
