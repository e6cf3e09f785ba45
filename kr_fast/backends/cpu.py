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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@registry.kernel("solver_step", "cpu", refuses=accepts(torch.float32))
def solver_step(sample, model_output, uncond_output, ids, history, row, *, guidance, seed, stream) -> Tensor:
    y = torch.empty_like(sample)
    batch = len(sample)
    _cpu.solver_step(
        sample.data_ptr(), model_output.data_ptr(), _address(uncond_output), _address(ids),
        [h.data_ptr() for h in history], row, guidance, seed, stream,
        batch, sample.numel() // max(batch, 1), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


@registry.kernel("pack_uint8", "cpu", refuses=accepts(torch.float32, torch.bfloat16, torch.float16))
def pack_uint8(x: Tensor) -> Tensor:
    x = x.float()  # exact from half precision
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not channels_last:
        x = x.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=torch.uint8)
    _cpu.pack_uint8(
        x.data_ptr(), batch, channels, height * width, channels_last, out.data_ptr(), torch.get_num_threads()
    )
    return out
