"""winograd_conv2d_grad_weight, with the gradient of the bias, against torch's (oneDNN), one and two threads.

``nchw`` and ``channels_last`` are torch's own backward in these layouts of all tensors; ours reads channels_last.
"""

import pytest
import torch
from training_cases import TRAINING

import kr_fast.ops  # noqa: F401  (registers the op)
from kr_fast.ops.nn.winograd_conv2d_grad_weight import winograd_conv2d_grad_weight

LAST = torch.channels_last
GEOMETRY = [1, 1], [1, 1], [1, 1], False, [0, 0], 1


def ours(x, grad_output, weight):
    return winograd_conv2d_grad_weight(x, grad_output, bias=True)


def torchs(x, grad_output, weight):
    arguments = grad_output, x, weight, [len(weight)], *GEOMETRY, [False, True, True]
    return torch.ops.aten.convolution_backward(*arguments)[1:]


PROVIDERS = {"kr_fast": (ours, LAST), "nchw": (torchs, torch.contiguous_format), "channels_last": (torchs, LAST)}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", TRAINING, ids=str)
@torch.inference_mode()
def test_winograd_conv2d_grad_weight(benchmark, case, provider, threads):
    benchmark.group = f"winograd_conv2d_grad_weight {case} {threads} threads"
    n, inputs, outputs, side = case
    run, layout = PROVIDERS[provider]
    generator = torch.Generator().manual_seed(0)
    shapes = (n, inputs, side, side), (n, outputs, side, side), (outputs, inputs, 3, 3)
    tensors = [torch.randn(shape, generator=generator).contiguous(memory_format=layout) for shape in shapes]
    want = torchs(*(each.contiguous() for each in tensors))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(run(*tensors), want, strict=True))
    assert error < 1e-4
    benchmark.pedantic(run, args=tensors, rounds=15, iterations=2, warmup_rounds=2)
    flop = 18 * n * inputs * outputs * side**2  # of the definition
    benchmark.extra_info.update(error=error, flop=flop)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info.update(gflop_per_second=1e-9 * flop / benchmark.stats.stats.min)
