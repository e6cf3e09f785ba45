"""The compiled modules ``kr_fast._cpu`` and ``kr_fast._cuda``: loaded here, and what every call of them needs.

A module that cannot be loaded is the reason that ``kr-fast info`` prints and a forced call raises.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call

Refuses = Callable[[Call], str | None]
CUDA_DEVICE = "cuda"  # the device type of the tensors that ``cuda`` takes; tests load a module that runs on the CPU


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _load(backend: str, mend: str) -> ModuleType | None:
    name = f"kr_fast._{backend}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        why = f"{name} was not built" if absent else f"{name} cannot be loaded ({_first_line(error)})"
        registry.mark_unavailable(backend, f"{why}; {mend}")
        return None


cpu = _load("cpu", "pip install . with a C++17 compiler and without KR_FAST_NO_EXT=1 builds it")
cuda = _load("cuda", "KR_FAST_CUDA=1 pip install . builds it with nvcc, or says what it lacks")
if cpu is not None and os.environ.get("KR_FAST_CPU_ISA"):
    cpu.set_isa(os.environ["KR_FAST_CPU_ISA"])
if importlib.util.find_spec("triton") is None:
    registry.mark_unavailable("triton", "triton is not installed; pip install triton")


def isa() -> str | None:
    """The instruction set of ``cpu``: "scalar", "avx2" or "avx512"; None where the module cannot be loaded."""
    return None if cpu is None else cpu.isa()


@functools.cache
def no_gpu() -> str | None:
    """Why torch can use no GPU here, with what would mend it, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs alone; install a build of torch for your GPU"
    try:
        torch.cuda.init()
    except Exception as error:  # a missing or too old driver, in torch's words
        return f"torch sees no GPU ({_first_line(error)}); see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def uncovered(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for ``architectures``, as in TORCH_CUDA_ARCH_LIST, does not run on a GPU of this generation."""
    for number, letter, ptx in re.findall(r"(\d+\.\d+)([a-z]?)(\+PTX)?", architectures):
        major, minor = map(int, number.split("."))
        same = capability == (major, minor) if letter else capability[0] == major and capability[1] >= minor
        if same or (ptx and not letter and capability >= (major, minor)):
            return False
    return True


@functools.cache
def no_code() -> str | None:
    """Why ``kr_fast._cuda`` holds no code for a GPU of this process, or None."""
    architectures = getattr(cuda, "architectures", None)
    for index in range(torch.cuda.device_count() if architectures else 0):
        capability = torch.cuda.get_device_capability(index)
        if uncovered(capability, architectures):
            needed = ".".join(map(str, capability))
            mend = f"TORCH_CUDA_ARCH_LIST={needed} KR_FAST_CUDA=1 pip install . builds it"
            return f"kr_fast._cuda has no code for compute capability {needed}, only for {architectures}; {mend}"
    return None


def missing(backend: str) -> str | None:
    """Why a whole backend cannot run here, with what would mend it, or None. Asks torch for its GPUs."""
    why = registry.unavailable(backend)
    if why is None and backend == "cuda" and torch.version.hip is not None:
        return "CUDA C++ kernels need an NVIDIA GPU, got ROCm"
    if why is None and backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if why is None and backend in ("cuda", "triton"):
        why = no_gpu()
    return no_code() if why is None and backend == "cuda" else why


def triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where a kernel does not fit a GPU or cannot be compiled for it, which is no RuntimeError."""
    module = sys.modules.get("triton.errors")
    return () if module is None else (module.TritonError,)


def address(tensor: Tensor | None) -> int:
    """Where the tensor's first element lies, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that a kernel of the CPU writes: torch's default dtype and device, which a user may set, have no say."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def scalar(value: float) -> Tensor:
    """float32 on the CPU."""
    return torch.scalar_tensor(value, dtype=torch.float32, device="cpu")


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
        if device != CUDA_DEVICE:
            return f"tensors must be on {CUDA_DEVICE}, got {device}"
        return no_code() if device == "cuda" else None

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
