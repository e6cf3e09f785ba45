"""Kernels of the family ``sampling`` in ``kr_fast._cpu``."""

import torch
from torch import Tensor

from kr_fast.backends import native, registry, structs
from kr_fast.backends.arguments import SolverStep
from kr_fast.backends.calls import Call


@registry.kernel("philox_normal", "cpu", refuses=native.cpu_tensors(torch.float32))
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int) -> Tensor:
    out = native.empty(len(ids), numel)
    native.cpu.philox_normal(ids.data_ptr(), len(ids), numel, seed, stream, out.data_ptr(), torch.get_num_threads())
    return out


@registry.kernel("solver_step", "cpu", refuses=native.cpu_tensors(torch.float32))
def solver_step(step: SolverStep) -> None:
    cond, uncond = step.model_output, step.uncond_output
    if not (cond.is_contiguous() and cond.dtype == torch.float32 and (uncond is None or uncond.is_contiguous())):
        uncond = None if uncond is None else uncond.float().contiguous()
        step = step._replace(model_output=cond.float().contiguous(), uncond_output=uncond)
    native.cpu.solver_step(structs.solver_step(step, channels_last=False), torch.get_num_threads())


@registry.kernel("pack_uint8", "cpu", refuses=native.cpu_tensors(torch.float32, torch.bfloat16, torch.float16))
def pack_uint8(x: Tensor) -> Tensor:
    x = x.float()  # exact from half precision
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not channels_last:
        x = x.contiguous()
    batch, channels, height, width = x.shape
    out = native.empty(batch, height, width, channels, dtype=torch.uint8)
    native.cpu.pack_uint8(
        x.data_ptr(), batch, channels, height * width, channels_last, out.data_ptr(), torch.get_num_threads()
    )
    return out


def _elsewhere(call: Call) -> str | None:
    """The predicate of an op on the host whose dtype is fixed."""
    return None if call.device == "cpu" else f"tensors must be on cpu, got {call.device}"


@registry.kernel("encode_png", "cpu", refuses=_elsewhere)
def encode_png(images: Tensor, size: int) -> Tensor:
    images = images.contiguous()
    batch, height, width, channels = images.shape
    out = native.empty(batch, size, dtype=torch.uint8)
    native.cpu.encode_png(images.data_ptr(), batch, height, width, channels, out.data_ptr(), torch.get_num_threads())
    return out
