"""``ModelArray`` on a CPU: the cases of ``kr-fast bench models``, at more images and with another network.

The bfloat16 rows compare with the same loop in bfloat16.
"""

import functools
import time

import pytest
import torch
from shared_cases import run
from small_networks import Airbench

from kr_fast.benchmarks.cases import models

MULTIPLICATIONS = {"resnet20": 40.6e6, "airbench": 118.1e6}  # of an image
airbenches = functools.partial(models.models_of, functools.partial(Airbench, (64, 256, 256), 10))
NETWORKS = {"resnet20": (models.resnet20s, 2048), "airbench": (airbenches, 512)}
CASES = [
    (name, models.case(name, make, images, dtype), dtype, images)
    for name, (make, images) in NETWORKS.items()
    for dtype in (torch.float32, torch.bfloat16)
]


def seconds_of_product(a):
    start = time.perf_counter()
    torch.mm(a, a)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("network", "case", "dtype", "images", "provider"),
    [pytest.param(*each, name, id=f"{name}-{each[1].name}") for each in CASES for name in each[1].providers],
)
def test_signals(benchmark, threads, network, case, dtype, images, provider):
    run(benchmark, case, provider, rounds=3, warmup_rounds=0)
    benchmark.group += f", {threads} threads"
    if not benchmark.stats:  # under --benchmark-disable
        return
    rate = models.COUNT * images / benchmark.stats.stats.median
    a = torch.randn(2048, 2048, dtype=dtype)
    peak = 2 * 2048**3 / min(seconds_of_product(a) for _ in range(5)) / 1e9
    flops = 2 * MULTIPLICATIONS[network] * rate / 1e9
    benchmark.extra_info |= {"image_models_per_s": rate, "gflops": flops, "percent_of_gemm": 100 * flops / peak}
