"""RMIA: counts by rank against the outer product, and votes of 2 and 18 queries against AVX comparisons of torch.

The outer products run over a share of x, which their rows name: all of it would take
seconds to minutes, and at A = 18 tens of GiB.
"""

import pytest
import torch

from kr_fast.membership import rmia_attack
from kr_fast.ops.membership.rmia import rmia

COUNT, POPULATION, MODELS = 50_000, 25_000, 64


def make(queries):
    generator = torch.Generator().manual_seed(0)
    shape = (queries,) if queries else ()
    return tuple(torch.randn(*shape, n, generator=generator).exp() for n in (COUNT, POPULATION))


def outer(x, z, rows):
    if x.ndim == 1:
        return (x[:rows, None] / z[None] >= 1).sum(1)
    votes = torch.zeros(rows, z.shape[1], dtype=torch.int8)
    for a in range(len(x)):
        votes += x[a, :rows, None] / z[a, None] >= 1
    return (2 * votes > len(x)).sum(1)


@pytest.mark.parametrize(("queries", "rows"), [(0, 2000), (2, 2000), (18, 500)])
@pytest.mark.parametrize("provider", ["outer product", "kr_fast"])
def test_rmia(benchmark, provider, queries, rows):
    x, z = make(queries)
    assert torch.equal((rmia(x, z)[0][:rows] * POPULATION).round().long(), outer(x, z, rows))
    benchmark.group = f"rmia N={COUNT} Z={POPULATION} A={max(queries, 1)}"
    if provider == "outer product":
        benchmark.pedantic(outer, (x, z, rows), rounds=3)
        benchmark.extra_info["share of x"] = rows / COUNT
    else:
        benchmark.pedantic(rmia, (x, z), rounds=5, warmup_rounds=1)
    benchmark.extra_info["threads"] = torch.get_num_threads()


@pytest.mark.parametrize("queries", [1, 2])
def test_all_targets(benchmark, queries):
    """Every shadow attacked from the others, from phi to scores."""
    benchmark.group = f"rmia, all targets, N={COUNT} Z={POPULATION} M={MODELS} A={queries}"
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(MODELS, COUNT, generator=generator).argsort(0).argsort(0) < MODELS // 2
    phi = torch.randn(queries, COUNT, MODELS, generator=generator) + 1.5 * keep.T
    population = torch.randn(queries, POPULATION, MODELS, generator=generator)
    benchmark.pedantic(rmia_attack, (phi, keep, population), rounds=2)
    benchmark.extra_info["threads"] = torch.get_num_threads()
