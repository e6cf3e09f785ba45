"""What a missing backend says, and which GPUs the code of ``kr_fast._cuda`` runs on. Needs no GPU."""

import importlib
import logging
import sys
import types

import pytest
import torch

import kr_fast
from kr_fast.backends import native, registry


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "8.0 9.0+PTX", True),
        ((8, 6), "8.0 9.0+PTX", True),  # a later minor number runs the code of an earlier one
        ((8, 0), "8.6", False),
        ((9, 0), "8.0", False),
        ((9, 0), "8.0+PTX", True),
        ((12, 0), "8.0 9.0+PTX", True),
        ((12, 0), "8.0 9.0", False),
        ((7, 5), "8.0 9.0+PTX", False),
        ((9, 0), "9.0a", True),
        ((10, 0), "9.0a+PTX", False),  # such code is for this generation alone
    ],
)
def test_code_runs_on_its_generation(capability, architectures, runs):
    assert native.uncovered(capability, architectures) is not runs


def test_a_gpu_without_code_is_named(monkeypatch):
    monkeypatch.setattr(native, "cuda", types.SimpleNamespace(architectures="8.0 9.0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    native.no_code.cache_clear()
    try:
        assert native.no_code() == (
            "kr_fast._cuda has no code for compute capability 7.5, only for 8.0 9.0; "
            "TORCH_CUDA_ARCH_LIST=7.5 KR_FAST_CUDA=1 pip install . builds it"
        )
        assert native.cuda_tensors(torch.float32)(native.Call("cuda", torch.float32)) == native.no_code()
    finally:
        native.no_code.cache_clear()


@pytest.fixture
def without_modules(monkeypatch):
    """As installed with KR_FAST_NO_EXT=1."""
    before = {name: registry.unavailable(name) for name in registry.BACKENDS}
    for name in ("kr_fast._cpu", "kr_fast._cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    yield
    for name, why in before.items():
        registry.mark_unavailable(name, why)


def test_modules_that_were_not_built_are_told_once(without_modules, caplog):
    x, t = torch.randn(4, 10), torch.randn(4, 10)
    expected = kr_fast.distillation_loss(x, t)
    spec = native.__spec__
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # marks in the registry what it cannot load
    assert (module.cpu, module.isa()) == (None, None)
    assert registry.unavailable("cpu").startswith("kr_fast._cpu was not built; pip install . with a C++17 compiler")
    assert module.missing("cuda").startswith("kr_fast._cuda was not built; KR_FAST_CUDA=1 pip install .")
    with caplog.at_level(logging.WARNING, logger="kr_fast"):
        torch.testing.assert_close(kr_fast.distillation_loss(x, t), expected)
        kr_fast.distillation_loss(x.double(), t.double())
        kr_fast.philox_normal(torch.arange(2), (3,), seed=1)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("every op runs on the slow reference backend: cpu: kr_fast._cpu was not built; ")
