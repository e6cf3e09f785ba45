"""philox_normal against torch's generator, on one thread.

All write float32 normals. ``generators`` is the usual way to per-image seeds: one torch.Generator an image.
"""

import pytest
import torch

import kr_fast
from kr_fast.ops.sampling import reference

# 256 x 3x32x32: a CIFAR batch, 3 MB; 512 x 1x8x8: digits, two vectors an image, so the call and the tails count;
# 8 x 3x224x224: few large images.
SHAPES = [(256, 3, 32, 32), (512, 1, 8, 8), (8, 3, 224, 224)]


pytestmark = pytest.mark.usefixtures("one_thread")


def generators(ids, shape):
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in ids.tolist()])


PROVIDERS = {
    "kr_fast": lambda ids, shape: kr_fast.philox_normal(ids, shape, seed=1),
    "torch.randn": lambda ids, shape: torch.randn(len(ids), *shape),
    "generators": generators,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_philox_normal(benchmark, shape, provider):
    benchmark.group = f"philox_normal {shape}"
    ids, image = torch.arange(shape[0]), shape[1:]
    out = PROVIDERS[provider](ids, image)
    assert out.shape == shape
    assert abs(out.mean()) < 0.05
    assert abs(out.std() - 1) < 0.05
    if provider == "kr_fast":
        want = reference.philox_normal(ids, out[0].numel(), seed=1, stream=0).view(shape)
        benchmark.extra_info["max_error"] = float((out - want).abs().max())
        assert benchmark.extra_info["max_error"] < 1e-3  # next to radius 0, where u = 1 - 2^-25
    benchmark.extra_info["bytes"] = out.numel() * 4
    benchmark(PROVIDERS[provider], ids, image)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info["normals_per_second"] = out.numel() / benchmark.stats.stats.min
