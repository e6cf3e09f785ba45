"""winograd_pack, once a layer when a network is made ready, against its definition in float64 torch, one thread."""

import pytest
import torch

import kr_fast
from kr_fast.backends import registry

# Outputs, inputs: a stage of ResNet-20, an airbench-like network, a UNet at 16 px.
CASES = [(64, 64), (256, 256), (320, 320)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_winograd_pack(benchmark, case, backend):
    benchmark.group = f"winograd_pack {case}"
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(*case, 3, 3, generator=draw)
    scale = torch.randn(case[0], generator=draw, dtype=torch.float64)
    with registry.forced(backend):
        packed = kr_fast.winograd_pack(weight, scale)
        error = float((packed - kr_fast.winograd_pack(weight, scale, dtype=torch.float64)).abs().max())
        assert error < 1e-5
        benchmark.extra_info.update(error=error, bytes=weight.nbytes + packed.nbytes)
        benchmark(kr_fast.winograd_pack, weight, scale)
