"""Where an op on a GPU's tensors is computed when only the CPU has a kernel. Needs no GPU: only names are compared."""

import logging

import pytest
import torch

from kr_fast.backends import registry
from kr_fast.backends.calls import Call

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


ON_GPU, ON_CPU = Call("cuda", torch.float64), Call("cpu", torch.float64)


@pytest.fixture(autouse=True)
def fresh():
    """What was logged once is logged again."""
    registry.mark_unavailable("triton", registry.unavailable("triton"))


def test_the_cpu_computes_what_the_gpu_has_no_kernel_for(caplog):
    with caplog.at_level(logging.WARNING, logger="kr_fast"):
        assert registry.device_for("roc", GPU, ON_GPU) == CPU
        assert registry.device_for("roc", GPU, ON_GPU) == CPU
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1  # once for a reason, not for every call
    assert messages[0].startswith("roc is computed on the cpu: cuda: ")


def test_a_kernel_for_the_gpu_keeps_it_there():
    with registry.added("roc", "triton", print):
        assert registry.device_for("roc", GPU, ON_GPU) == GPU
        assert registry.device_for("roc", CPU, ON_CPU) == CPU
    assert registry.device_for("roc", GPU, ON_GPU) == CPU


@pytest.mark.parametrize(("backend", "expected"), [("cpu", CPU), ("reference", GPU), ("cuda", GPU)])
def test_a_forced_backend_decides(backend, expected):
    with registry.forced(backend):
        assert registry.device_for("roc", GPU, ON_GPU) == expected
        assert registry.device_for("roc", CPU, ON_CPU) == CPU
