"""conv2d_grad_norms against what others pay for it, one and two threads.

``grad_weight`` is torch's gradient summed over the batch: no norms, but as many operations, of a step without privacy.
"""

import pytest
import torch
from per_sample import CONVOLUTIONS, check, convolution, grad_weight, looped, norms, unfolded

import kr_fast


def ours(x, grad_output, kernel, **options):
    return kr_fast.conv2d_grad_norms(x, grad_output, kernel, **options)


def opacus(x, grad_output, kernel, **options):
    return norms(unfolded(x, grad_output, kernel, **options))


def loop(x, grad_output, kernel, **options):
    return norms(looped(x, grad_output, kernel, **options))


PROVIDERS = {"kr_fast": ours, "grad_weight": grad_weight, "unfold": opacus, "loop": loop}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.inference_mode()
def test_conv2d_grad_norms(benchmark, name, provider, threads):
    benchmark.group = f"conv2d_grad_norms {name} {threads} threads"
    kernel = CONVOLUTIONS[name][3]
    x, grad_output, options = convolution(name)
    run = PROVIDERS[provider]
    found = run(x, grad_output, kernel, **options)
    if provider != "grad_weight":
        error = check(found, norms(unfolded(x.double(), grad_output.double(), kernel, **options)))
        benchmark.extra_info.update(error=error)
    benchmark.pedantic(run, args=(x, grad_output, kernel), kwargs=options, rounds=15, iterations=2, warmup_rounds=2)
    filters = x.shape[1] // options["groups"] * kernel**2
    flop = 2 * grad_output.numel() * filters
    benchmark.extra_info.update(flop=flop, parameters=grad_output.shape[1] * filters)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info.update(gflop_per_second=1e-9 * flop / benchmark.stats.stats.min)
