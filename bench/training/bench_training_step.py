"""A whole training step: ``kr-fast bench training``, on one thread and on two."""

import pytest
from shared_cases import pairs, run


@pytest.mark.parametrize(("case", "provider"), pairs("training"))
def test_training_step(benchmark, threads, case, provider):
    run(benchmark, case, provider, rounds=8 if "28 px" in case.name else 30)
    benchmark.group += f", {threads} threads"
