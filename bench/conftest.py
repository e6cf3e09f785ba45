"""Numbers of threads."""

import pytest
import torch


def _with(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    yield from _with(1)


@pytest.fixture(params=[1, 2], ids="{}thread".format)
def threads(request):
    """One and two."""
    yield from _with(request.param)
