"""Finished toy runs for all tests that only look at them or compare with them."""

import pytest
from toy_runs import WHOLE_AUDIT, toy


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The toy preset: shadow Students with the run's own generator, no positive control."""
    out = tmp_path_factory.mktemp("toy") / "run"
    done = toy(out)
    return out, done.stdout


@pytest.fixture(scope="session")
def audited(tmp_path_factory):
    """A toy run with everything that an audit can have: retrained generators, positive control, audit.html."""
    out = tmp_path_factory.mktemp("audited") / "run"
    done = toy(out, *WHOLE_AUDIT)
    return out, done.stdout
