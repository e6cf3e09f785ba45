"""Exact ROC, AUC, DeLong interval and TPR at low FPR of 50,000 scores: part of ``kr-fast bench audit``."""

import pytest
from shared_cases import pairs, run


@pytest.mark.parametrize(("case", "provider"), pairs("audit", "roc"))
def test_roc(benchmark, case, provider):
    run(benchmark, case, provider, rounds=20)
