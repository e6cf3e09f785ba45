"""winograd_conv2d against torch's convolutions, all with bias and ReLU; and in training, where it packs its filters.

``onednn`` is the operator that torch's own inductor emits, with packed weights and the ReLU in its epilogue, in float32
and (``onednn_bf16``) in bfloat16 on CPUs that have it; ``channels_last`` is F.conv2d on folded weights, ``compile`` the
same under torch.compile. Everyone reads and writes channels_last. One thread: ModelArray runs a chunk in each.
"""

import pytest
import torch
import torch.nn.functional as F
from training_cases import TRAINING

import kr_fast

LAST = torch.channels_last
# N, inputs, outputs, side: the stages of ResNet-20, of an airbench-like network, and of a UNet at 16 px.
CASES = [
    (32, 16, 16, 32),
    (32, 32, 32, 16),
    (32, 64, 64, 8),
    (32, 24, 64, 31),
    (32, 64, 64, 15),
    (32, 64, 256, 15),
    (32, 256, 256, 7),
    (8, 320, 320, 16),
]


def ours(weight, bias, shape):
    packed, outputs = kr_fast.winograd_pack(weight), len(weight)
    return lambda x: kr_fast.winograd_conv2d(x, packed, outputs, bias=bias, activation="relu")


def onednn(weight, bias, shape):
    one = [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, one, one, one, 1, list(shape))
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda x: run(x, packed, bias, one, one, one, 1, "relu", [], "")


def channels_last(weight, bias, shape):
    weight = weight.contiguous(memory_format=LAST)
    return lambda x: F.conv2d(x, weight, bias, padding=1).relu_()


def compiled(weight, bias, shape):
    torch._dynamo.reset()
    return torch.compile(channels_last(weight, bias, shape), dynamic=False)


PROVIDERS = {
    "kr_fast": ours,
    "onednn": onednn,
    "onednn_bf16": onednn,
    "channels_last": channels_last,
    "compile": compiled,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
@pytest.mark.usefixtures("one_thread")
def test_winograd_conv2d(benchmark, case, provider):
    benchmark.group = f"winograd_conv2d {case} 1 thread"
    n, inputs, outputs, side = case
    dtype = torch.bfloat16 if provider == "onednn_bf16" else torch.float32
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, side, side, generator=generator).relu().contiguous(memory_format=LAST)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    run = PROVIDERS[provider](weight.to(dtype), bias.to(dtype), x.shape)
    x = x.to(dtype)
    error = float((run(x).double() - want).abs().max())
    assert error < (2e-5 if dtype == torch.float32 else 0.1)
    benchmark.pedantic(run, args=(x,), rounds=15, iterations=2, warmup_rounds=2)
    flop = 18 * n * inputs * outputs * side**2  # of the definition
    benchmark.extra_info.update(error=error, flop=flop)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info.update(gflop_per_second=1e-9 * flop / benchmark.stats.stats.min)


def training_step(function, layout):
    """Forward and backward by all three, by autograd, in one layout of all tensors."""

    def run(x, weight, bias, upstream):
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    return run, layout


def torchs(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


TRAINING_PROVIDERS = {
    "kr_fast": training_step(lambda x, weight, bias: kr_fast.winograd_conv2d(x, weight, bias=bias), LAST),
    "nchw": training_step(torchs, torch.contiguous_format),
    "channels_last": training_step(torchs, LAST),
}


@pytest.mark.parametrize("provider", TRAINING_PROVIDERS)
@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_winograd_conv2d_training(benchmark, case, provider, threads):
    """See bench_winograd_conv2d_grad_weight.py for one of the three passes alone."""
    benchmark.group = f"winograd_conv2d training {case} {threads} threads"
    n, inputs, outputs, side = case
    run, layout = TRAINING_PROVIDERS[provider]
    generator = torch.Generator().manual_seed(0)
    shapes = (n, inputs, side, side), (outputs, inputs, 3, 3), (n, outputs, side, side)
    x, weight, upstream = (torch.randn(s, generator=generator).contiguous(memory_format=layout) for s in shapes)
    weight, bias = weight / (9 * inputs) ** 0.5, torch.randn(outputs, generator=generator)
    tensors = x, weight, bias, upstream
    want = TRAINING_PROVIDERS["nchw"][0](*(each.contiguous() for each in tensors))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(run(*tensors), want, strict=True))
    assert error < 1e-4
    benchmark.pedantic(run, args=tensors, rounds=15, iterations=2, warmup_rounds=2)
    flop = 3 * 18 * n * inputs * outputs * side**2  # of the definition
    benchmark.extra_info.update(error=error, flop=flop)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info.update(gflop_per_second=1e-9 * flop / benchmark.stats.stats.min)
