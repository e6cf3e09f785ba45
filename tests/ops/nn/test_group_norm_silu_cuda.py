"""The CUDA kernel of group_norm_silu on the CPU, every thread a fiber (support/cuda_host).

Cases by regime: elements one by one; vectors of 4 floats and 8 halves; more groups than a block takes, with a shorter
last block; 3 channels a group; a wide group of more vectors than threads; samples that do not fit shared memory.
"""

import pytest
import torch
from cuda_on_host import in_use, machine

import kr_fast
from kr_fast.backends import registry

LAST = torch.channels_last
TYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    ((2, 1, 1, 1), 1),
    ((2, 5, 3, 5), 5),
    ((2, 64, 7, 7), 32),
    ((1, 72, 4, 4), 24),
    ((1, 96, 4, 5), 32),
    ((1, 2112, 2, 2), 1),
    ((1, 264, 1, 3), 1),
    ((1, 32, 40, 41), 4),
]


def both(host_cuda, x, groups, weight, bias, **more):
    """What the reference makes in float64, and the kernel in the dtype of ``x``."""
    double = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in more.items()}
    with registry.forced("reference"):
        want = kr_fast.group_norm_silu(x.double(), groups, weight.double(), bias.double(), **double)
    with in_use(host_cuda):
        got = kr_fast.group_norm_silu(x, groups, weight, bias, **more)
    assert got.dtype == x.dtype
    return want, got.double()


def close(found, dtype):
    want, got = found
    relative = {torch.float32: 4e-6, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}[dtype]
    # A group of one element is its bias, to the rounding of element and shift over sqrt(eps).
    torch.testing.assert_close(got, want, rtol=relative, atol=5e-5 if want[0].numel() == 1 else 1e-5)


@pytest.mark.sanitize
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_against_float64(host_cuda, shape, groups, dtype):
    torch.manual_seed(sum(shape))
    x = (2 * torch.randn(shape) + 3).to(dtype).contiguous(memory_format=LAST)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    shift = torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 2:-1]  # rows apart
    for more in ({"activation": None}, {"shift": shift}):
        close(both(host_cuda, x, groups, weight, bias, **more), dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("channels", [(32, 32, 8), (64, 32, 32), (17, 7, 6), (8, 60, 4)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_second_source(host_cuda, channels, dtype):
    first, second, groups = channels
    torch.manual_seed(first)
    x, skip = (torch.randn(2, c, 5, 4).to(dtype).contiguous(memory_format=LAST) for c in (first, second))
    weight, bias, shift = torch.randn(first + second), torch.randn(first + second), torch.randn(2, first + second)
    close(both(host_cuda, x, groups, weight, bias, skip=skip, shift=shift), dtype)


@pytest.mark.sanitize
def test_special_sizes_and_addresses(host_cuda):
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=LAST)
    one, zero = torch.ones(8), torch.zeros(8)
    want, got = both(host_cuda, x + 1e4, 2, one, zero, activation=None)
    assert (got - want).abs().max() < 0.02
    moved = torch.empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)  # not 16-byte aligned
    close(both(host_cuda, moved, 2, one, zero), torch.float32)
    with in_use(host_cuda):
        assert kr_fast.group_norm_silu(x[:0], 2, None, None).shape == (0, 8, 4, 4)
        plain = kr_fast.group_norm_silu(x, 2, None, None)
        with machine(host_cuda, descending=True):  # a missing barrier would show
            assert torch.equal(kr_fast.group_norm_silu(x, 2, None, None), plain)
    close((both(host_cuda, x, 2, one, zero)[0], plain.double()), torch.float32)
