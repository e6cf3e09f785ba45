"""RMIA: counts by rank against the outer product, and the vote of 18 queries against AVX comparisons of torch.

``pytest bench/bench_rmia.py``. The outer products run over a share of x, which their rows name: all of it would take
seconds to minutes, and at A = 18 tens of GiB.
"""

import pytest
import torch

from kr_fast.ops.rmia import rmia

COUNT, POPULATION = 50_000, 25_000


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


@pytest.mark.parametrize(("queries", "rows"), [(0, 2000), (18, 500)])
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
