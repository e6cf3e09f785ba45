"""Fixtures and markers for all tests."""

import shutil

import pytest
import torch

from kr_fast import _cpu
from kr_fast.backends import registry


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=_cpu.isa_available())
def isa(request):
    """Each instruction set that this machine can run."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture
def reference():
    """Everything on the reference backend."""
    with registry.forced("reference"):
        yield


@pytest.fixture
def nvcc():
    """The path of nvcc; skips without it."""
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return found
