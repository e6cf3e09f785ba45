"""group_norm_silu against torch, eager in both layouts and compiled; forward alone, and with all gradients.

Everyone gets the tensor in its own layout before the clock starts. 2 channels a group is the trap of torch's NHWC path.
Where gradients are taken, everyone gets memory that the process already has, see bench_batch_norm_act.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import kr_fast

LAST = torch.channels_last
# N, C, H, W, groups: 2 channels a group and 200 KB a sample; 8 a group and 256 KB; the 8x8 digits UNet; more than L2.
CASES = [(32, 64, 28, 28, 32), (16, 256, 16, 16, 32), (256, 32, 8, 8, 8), (4, 64, 112, 112, 32)]
# The first level of the UNet at 28 pixels and of the digits UNet.
TRAINING = [(64, 32, 28, 28, 8), (128, 32, 8, 8, 8), (64, 64, 14, 14, 32)]
PROVIDERS = ["kr_fast", "eager_nchw", "eager_nhwc", "compile_nchw", "compile_nhwc"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def providers(x, groups, weight, bias):
    last = x.contiguous(memory_format=LAST)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.silu(F.group_norm(x, groups, weight, bias)), dynamic=False)
    return {
        "kr_fast": lambda: kr_fast.group_norm_silu(last, groups, weight, bias),
        "eager_nchw": lambda: F.silu(F.group_norm(x, groups, weight, bias)),
        "eager_nhwc": lambda: F.silu(F.group_norm(last, groups, weight, bias)),
        "compile_nchw": lambda: compiled(x),
        "compile_nhwc": lambda: compiled(last),
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_group_norm_silu(benchmark, threads, case, dtype, provider):
    benchmark.group = f"group_norm_silu {case} {dtype} {threads} threads"
    *shape, groups = case
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw).to(DTYPES[dtype])
    weight, bias = (torch.randn(shape[1], generator=draw).to(x.dtype) for _ in range(2))
    run = providers(x, groups, weight, bias)[provider]
    exact = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double()))
    error = float((run().double() - exact).abs().max())
    assert error < (1e-4 if dtype == "float32" else 0.15)
    moved = 2 * x.numel() * x.element_size()
    target = torch.empty_like(x)
    copy = moved / Timer("b.copy_(a)", globals={"a": x, "b": target}).blocked_autorange(min_run_time=0.05).median
    benchmark.extra_info.update(error=error, bytes=moved)
    benchmark.pedantic(run, rounds=20, iterations=3, warmup_rounds=3)
    if benchmark.stats:  # not under --benchmark-disable
        rate = moved / benchmark.stats.stats.min
        benchmark.extra_info.update(gb_per_second=rate / 1e9, share_of_copy_bandwidth=rate / copy)


def stepped(provider, x, groups, weight, bias, grad):
    """y and the gradients of x, weight and bias, without arguments."""
    layout = torch.contiguous_format if provider.endswith("nchw") else LAST
    tensors = [x.contiguous(memory_format=layout), weight, bias]
    tensors, grad = [each.detach().requires_grad_() for each in tensors], grad.contiguous(memory_format=layout)
    torch._dynamo.reset()
    function = lambda x, weight, bias: F.silu(F.group_norm(x, groups, weight, bias))  # noqa: E731
    if provider == "kr_fast":
        function = lambda x, weight, bias: kr_fast.group_norm_silu(x, groups, weight, bias)  # noqa: E731
    elif provider.startswith("compile"):
        function = torch.compile(function, dynamic=False)

    def run():
        y = function(*tensors)
        return y, *torch.autograd.grad(y, tensors, grad)

    return run


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_with_gradients(benchmark, threads, case, provider):
    benchmark.group = f"group_norm_silu and gradients {case} float32 {threads} threads"
    *shape, groups = case
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=draw) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=draw) for _ in range(2))
    torch.empty(31 << 18)  # freed: from now on the process keeps blocks of up to 31 MB
    run = stepped(provider, x, groups, weight, bias, grad)
    exact = stepped("eager_nchw", x.double(), groups, weight.double(), bias.double(), grad.double())
    error = max(float((a.double() - b).abs().mean() / b.abs().mean()) for a, b in zip(run(), exact(), strict=True))
    assert error < 1e-5
    moved = 5 * x.numel() * 4  # x and y; g, x and dx
    benchmark.extra_info.update(error=error, bytes=moved)
    benchmark.pedantic(run, rounds=30, iterations=3, warmup_rounds=5)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info["gb_per_second"] = moved / benchmark.stats.stats.min / 1e9
