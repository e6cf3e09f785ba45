"""The distillation loss, forward and backward: ``kr-fast bench loss``."""

import pytest
from shared_cases import pairs, run


@pytest.mark.parametrize(("case", "provider"), pairs("loss"))
def test_distillation_loss(benchmark, case, provider):
    big = case.moved > 2**29
    run(benchmark, case, provider, **{"rounds": 20} if big else {"rounds": 50, "iterations": 5, "warmup_rounds": 10})
