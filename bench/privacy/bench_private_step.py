"""A private training step: ``kr-fast bench privacy``, on one thread.

``peak_mib`` is what a step of 256 images holds at most of torch's memory besides weights and inputs.
"""

import pytest
import torch
from shared_cases import pairs, run

from kr_fast.benchmarks.cases.privacy import BATCH, PROVIDERS


def peak_mib(step):
    """Most that is allocated at a time by torch in a call, besides what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


@pytest.mark.parametrize(("case", "provider"), pairs("privacy"))
def test_private_step(benchmark, one_thread, case, provider):
    run(benchmark, case, provider, rounds=8)
    large = PROVIDERS[provider](case.name.removeprefix("private step, "), 4 * BATCH)
    large()
    benchmark.extra_info["peak_mib"] = round(peak_mib(large), 1)
