"""The cases of ``kr-fast bench`` as pytest-benchmark's."""

import pytest
import torch

from kr_fast.benchmarks import cases
from kr_fast.benchmarks.case import Unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pairs(kind, holding=""):
    """(case, provider) of a kind on this device, as parameters: of cases whose names begin with ``holding``."""
    found = [case for case in cases.of(kind, DEVICE) if case.name.startswith(holding)]
    return [pytest.param(case, name, id=f"{name}-{case.name}") for case in found for name in case.providers]


def run(benchmark, case, provider, **times):
    """Right first, then its time, with what it amounts to beside it."""
    benchmark.group = case.name
    try:
        work = case.prepared(provider)
    except Unavailable as reason:
        pytest.skip(str(reason))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.run()
        benchmark.extra_info["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def once():
        work.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, **{"rounds": 10, "warmup_rounds": 2} | times)
    facts = case.facts(benchmark.stats.stats.median / work.share) if benchmark.stats else {}  # not where disabled
    benchmark.extra_info |= {"provider": provider, "threads": torch.get_num_threads(), "error": work.error}
    benchmark.extra_info |= {"share": work.share, "bytes": case.moved}
    if facts:
        benchmark.extra_info["gb_per_s"] = round(facts["gb_per_s"], 1)
        benchmark.extra_info["percent_of_copy"] = round(100 * facts["share_of_copy"], 1)
