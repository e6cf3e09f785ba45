"""RMIA: its comparisons, which are part of ``kr-fast bench audit``, and whole attacks."""

import pytest
import torch
from shared_cases import pairs, run

from kr_fast.benchmarks.cases.audit import COUNT, POPULATION
from kr_fast.membership import rmia_attack

MODELS = 64


@pytest.mark.parametrize(("case", "provider"), pairs("audit", "rmia"))
def test_rmia(benchmark, case, provider):
    run(benchmark, case, provider, rounds=3, warmup_rounds=1)


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
