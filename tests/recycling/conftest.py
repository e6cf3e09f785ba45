"""One finished toy run for all tests that only look at it or compare with it."""

import pytest
from toy_runs import toy


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    done = toy(out)
    return out, done.stdout
