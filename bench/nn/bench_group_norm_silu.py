"""group_norm_silu against torch, eager in both layouts and compiled.

Everyone gets the tensor in its own layout before the clock starts. 2 channels a group is the trap of torch's NHWC path.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import kr_fast

LAST = torch.channels_last
# N, C, H, W, groups: 2 channels a group and 200 KB a sample; 8 a group and 256 KB; the 8x8 digits UNet; more than L2.
CASES = [(32, 64, 28, 28, 32), (16, 256, 16, 16, 32), (256, 32, 8, 8, 8), (4, 64, 112, 112, 32)]
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


@pytest.mark.parametrize("provider", ["kr_fast", "eager_nchw", "eager_nhwc", "compile_nchw", "compile_nhwc"])
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
