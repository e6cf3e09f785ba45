"""Kernels of ``kr_fast._cpu`` (C++, AVX2 or AVX-512 by run-time choice, plain C++ elsewhere).

Callers have checked their arguments; here outputs are allocated and addresses taken. The module loads on first import
and a failure is kept as the reason that ``kr-fast info`` prints and a forced call raises.
"""

import os

import torch
from torch import Tensor

from kr_fast.backends import registry

try:
    from kr_fast import _cpu
except ImportError as error:
    _cpu = None
    registry.mark_unavailable("cpu", f"kr_fast._cpu cannot be loaded ({error}); reinstall with a C++17 compiler")

if _cpu is not None and os.environ.get("KR_FAST_CPU_ISA"):
    _cpu.set_isa(os.environ["KR_FAST_CPU_ISA"])


def accepts(*dtypes: torch.dtype):
    """A predicate: CPU tensors of one of ``dtypes``."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(device: str, dtype: torch.dtype, size: int) -> str | None:
        if device != "cpu":
            return f"tensors must be on cpu, got {device}"
        if dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}"
        return None

    return refuses


@registry.kernel("philox_normal", "cpu", refuses=accepts(torch.float32))
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int) -> Tensor:
    out = torch.empty(len(ids), numel, dtype=torch.float32)
    _cpu.philox_normal(ids.data_ptr(), len(ids), numel, seed, stream, out.data_ptr(), torch.get_num_threads())
    return out
