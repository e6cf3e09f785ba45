"""Where an op on a GPU's tensors is computed when only the CPU has a kernel. Needs no GPU: only names are compared."""

import logging

import pytest
import torch

from kr_fast.backends import registry

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh():
    registry._has_kernel.cache_clear()
    yield
    registry._has_kernel.cache_clear()


def test_the_cpu_computes_what_the_gpu_has_no_kernel_for(caplog):
    with caplog.at_level(logging.WARNING, logger="kr_fast"):
        assert registry.nearest("roc", GPU, torch.float64) == CPU
        assert registry.nearest("roc", GPU, torch.float64) == CPU
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1  # once for a reason, not for every call
    assert told[0].startswith("roc is computed on the cpu: cuda: ")


def test_a_kernel_for_the_gpu_keeps_it_there(monkeypatch):
    monkeypatch.setitem(registry._kernels, ("roc", "triton"), (print, lambda device, dtype, size: None))
    monkeypatch.delitem(registry._unavailable, "triton", raising=False)
    assert registry.nearest("roc", GPU, torch.float64) == GPU
    assert registry.nearest("roc", CPU, torch.float64) == CPU


@pytest.mark.parametrize(("backend", "home"), [("cpu", CPU), ("reference", GPU), ("cuda", GPU)])
def test_a_forced_backend_decides(backend, home):
    with registry.forced(backend):
        assert registry.nearest("roc", GPU, torch.float64) == home
        assert registry.nearest("roc", CPU, torch.float64) == CPU
