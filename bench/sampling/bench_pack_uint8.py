"""pack_uint8 against the usual formula in torch, one thread.

Every provider takes float32 images in [-1, 1], NCHW or channels_last, and returns uint8 NHWC. ``eager`` is the formula
of diffusers' image processor, ``compile`` the same under ``torch.compile``.
"""

import pytest
import torch
from torch.utils.benchmark import Timer

import kr_fast

# 512 x 1x8x8: digits, so the call counts; 256 x 3x32x32: a CIFAR batch, 3 MB; 16 x 3x224x224: 10 MB, memory bandwidth.
SHAPES = [(512, 1, 8, 8), (256, 3, 32, 32), (16, 3, 224, 224)]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

pytestmark = pytest.mark.usefixtures("one_thread")


def formula(x):
    return (x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def compiled():
    torch._dynamo.reset()
    return torch.compile(formula, dynamic=False)


PROVIDERS = {"kr_fast": lambda: kr_fast.pack_uint8, "eager": lambda: formula, "compile": compiled}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_uint8(benchmark, shape, layout, provider):
    benchmark.group = f"pack_uint8 {shape} {layout}"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.5)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    run, expected = PROVIDERS[provider](), formula(x.double())
    error = int((run(x).int() - expected.int()).abs().max())
    assert error <= 1  # a tie in float32
    moved, target = 5 * x.numel(), torch.empty_like(x)
    copy = 8 * x.numel() / Timer("b.copy_(a)", globals={"a": x, "b": target}).blocked_autorange(min_run_time=0.1).median
    benchmark.extra_info.update(error=error, bytes=moved)
    benchmark(run, x)
    if benchmark.stats:  # not under --benchmark-disable
        rate = moved / benchmark.stats.stats.min
        benchmark.extra_info.update(gb_per_second=rate / 1e9, share_of_copy_bandwidth=rate / copy)
