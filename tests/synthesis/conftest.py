import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks of these tests are small."""
