"""membership_signals, all six: part of ``kr-fast bench audit``."""

import pytest
from shared_cases import pairs, run


@pytest.mark.parametrize(("case", "provider"), pairs("audit", "membership_signals"))
def test_membership_signals(benchmark, case, provider):
    run(benchmark, case, provider, warmup_rounds=3)
