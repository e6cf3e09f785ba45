"""The compiled modules ``kr_fast._cpu`` and ``kr_fast._cuda``: loaded here, and what every call of them needs.

A module that cannot be loaded is the reason that ``kr-fast info`` prints and a forced call raises.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call

Refuses = Callable[[Call], str | None]
CUDA_DEVICE = "cuda"  # the device type of the tensors that ``cuda`` takes; tests load a module that runs on the CPU


def _load(backend: str, hint: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"kr_fast._{backend}")
    except ImportError as error:
        registry.mark_unavailable(backend, f"kr_fast._{backend} cannot be loaded ({error}); {hint}")
        return None


cpu = _load("cpu", "reinstall with a C++17 compiler")
cuda = _load("cuda", "install kr-fast where nvcc is found, see KR_FAST_CUDA")
if cpu is not None and os.environ.get("KR_FAST_CPU_ISA"):
    cpu.set_isa(os.environ["KR_FAST_CPU_ISA"])
if importlib.util.find_spec("triton") is None:
    registry.mark_unavailable("triton", "triton is not installed; pip install triton")


def isa() -> str | None:
    """The instruction set of ``cpu``: "scalar", "avx2" or "avx512"; None where the module cannot be loaded."""
    return None if cpu is None else cpu.isa()


def address(tensor: Tensor | None) -> int:
    """Where the tensor's first element lies, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as an address."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def cpu_tensors(*dtypes: torch.dtype) -> Refuses:
    """A predicate: CPU tensors of one of ``dtypes``."""
    return _tensors(lambda device: None if device == "cpu" else f"tensors must be on cpu, got {device}", dtypes)


def cuda_tensors(*dtypes: torch.dtype) -> Refuses:
    """A predicate: tensors of one of ``dtypes`` on an NVIDIA GPU."""

    def elsewhere(device: str) -> str | None:
        if torch.version.hip is not None:
            return "CUDA C++ kernels need an NVIDIA GPU, got ROCm"
        return None if device == CUDA_DEVICE else f"tensors must be on {CUDA_DEVICE}, got {device}"

    return _tensors(elsewhere, dtypes)


def triton_tensors(*dtypes: torch.dtype) -> Refuses:
    """A predicate: tensors of one of ``dtypes`` on a GPU, or anywhere under TRITON_INTERPRET=1."""

    def elsewhere(device: str) -> str | None:
        if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"tensors must be on cuda (or TRITON_INTERPRET=1 set), got {device}"

    return _tensors(elsewhere, dtypes)


def _tensors(elsewhere: Callable[[str], str | None], dtypes: tuple[torch.dtype, ...]) -> Refuses:
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(call: Call) -> str | None:
        if why := elsewhere(call.device):
            return why
        got = str(call.dtype).removeprefix("torch.")
        return None if call.dtype in dtypes else f"dtype must be one of {names}, got {got}"

    return refuses
