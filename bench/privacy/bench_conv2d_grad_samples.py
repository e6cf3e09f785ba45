"""conv2d_grad_samples against a torch call for each record and against unfold and einsum, for the first stages."""

import pytest
import torch
from per_sample import check, convolution, looped, unfolded

import kr_fast


def ours(x, grad_output, kernel, **options):
    return kr_fast.conv2d_grad_samples(x, grad_output, kernel, **options)[0]


PROVIDERS = {"kr_fast": ours, "unfold": unfolded, "loop": looped}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["resnet stem", "resnet 1", "unet 1", "depthwise 1", "depthwise 3"])
@torch.inference_mode()
def test_conv2d_grad_samples(benchmark, name, provider, threads):
    benchmark.group = f"conv2d_grad_samples {name} {threads} threads"
    x, grad_output, options = convolution(name)
    run = PROVIDERS[provider]
    wanted = unfolded(x.double(), grad_output.double(), 3, **options)
    error = check(run(x, grad_output, 3, **options).reshape(wanted.shape), wanted)
    benchmark.pedantic(run, args=(x, grad_output, 3), kwargs=options, rounds=15, iterations=2, warmup_rounds=2)
    benchmark.extra_info.update(error=error, flop=18 * grad_output.numel() * x.shape[1] // options["groups"])
