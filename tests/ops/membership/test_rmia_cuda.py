"""The CUDA kernels of RMIA: the counts of the reference, on the CPU (support/cuda_host) and on a GPU if there is one.

Z: 1; 31, 32, 33 around a tile; 130 several. N: 5; 256, 257 around a block. A: 1 and 2; 64, 65 around the queries that
are held in shared memory at a time.
"""

import math

import pytest
import torch
from cuda_on_host import in_use, machine

from kr_fast.backends import registry
from kr_fast.backends.codes import PREDICATES
from kr_fast.ops.membership.rmia import rmia


def make(queries, count, population, dtype, kind="ties"):
    g = torch.Generator().manual_seed(count + population)
    x, z = (torch.randn(queries, n, dtype=torch.float64, generator=g).exp() for n in (count, population))
    if kind == "ties":
        x, z = (x * 2).round() / 2, (z * 2).round() / 2  # zeros among them
    if kind == "infinite":
        x[:, ::3], z[:, ::2], x[:, 1::5], z[:, 1::5] = math.inf, math.inf, 0.0, 0.0
    if kind == "neighbours":  # ratios within a few roundings of gamma
        eps = torch.finfo(dtype).eps
        x, z = (3 * (1 + eps * torch.randint(-4, 5, v.shape, generator=g).double()) for v in (x, z))
    return x.to(dtype), z.to(dtype)


def compare(device, x, z, **options):
    with registry.forced("reference"):
        wanted = rmia(x, z, **options)
    found = rmia(x.to(device), z.to(device), **options)
    assert found[0].device == found[1].device == x.to(device).device
    assert torch.equal(found[0].cpu(), wanted[0])
    torch.testing.assert_close(found[1].cpu(), wanted[1])


@pytest.mark.sanitize
@pytest.mark.parametrize("predicate", PREDICATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite", "neighbours"])
def test_all_kinds_of_ratios(cuda_device, predicate, dtype, kind):
    for gamma in (1.0, 2.0):
        for queries in (1, 3):
            compare(cuda_device, *make(queries, 40, 50, dtype, kind), gamma=gamma, predicate=predicate)
    x, z = make(1, 40, 50, dtype, kind)
    compare(cuda_device, x[0], z[0], predicate=predicate)


@pytest.mark.sanitize
@pytest.mark.parametrize("population", [1, 31, 32, 33, 130])
@pytest.mark.parametrize(("queries", "count"), [(1, 5), (2, 5), (2, 256), (2, 257), (64, 5), (65, 5)])
def test_votes_of_all_kinds_of_sizes(cuda_device, population, queries, count):
    compare(cuda_device, *make(queries, count, population, torch.float32))


@pytest.mark.sanitize
def test_order_and_strides_do_not_matter(host_cuda):
    x, z = make(3, 600, 70, torch.float32)
    with in_use(host_cuda):
        wanted = rmia(x, z)[0]
        with machine(host_cuda, descending=True):
            assert torch.equal(rmia(x, z)[0], wanted)
        single = rmia(x[0], z[0])[0]
        with machine(host_cuda, descending=True, most_blocks=1):
            assert torch.equal(rmia(x[0], z[0])[0], single)
