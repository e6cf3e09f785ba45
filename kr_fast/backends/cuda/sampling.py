"""Kernels of the family ``sampling`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry, structs
from kr_fast.backends.arguments import SolverStep, SolverTableStep, in_one_layout


@registry.kernel("philox_normal", "cuda", refuses=native.cuda_tensors(torch.float32))
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int) -> Tensor:
    out = torch.empty(len(ids), numel, dtype=torch.float32, device=ids.device)
    with native.on(ids):
        native.cuda.philox_normal(ids.data_ptr(), len(ids), numel, seed, stream, out.data_ptr(), native.stream(ids))
    return out


@registry.kernel("solver_step", "cuda", refuses=native.cuda_tensors(torch.float32))
def solver_step(step: SolverStep) -> None:
    step, channels_last = in_one_layout(step)
    with native.on(step.sample):
        native.cuda.solver_step(structs.solver_step(step, channels_last), native.stream(step.sample))


@registry.kernel("solver_step_at", "cuda", refuses=native.cuda_tensors(torch.float32))
def solver_step_at(call: SolverTableStep) -> None:
    call, channels_last = in_one_layout(call)
    with native.on(call.samples):
        native.cuda.solver_step(structs.solver_table_step(call, channels_last), native.stream(call.samples))


@registry.kernel("pack_uint8", "cuda", refuses=native.cuda_tensors(*codes.DTYPES))
def pack_uint8(x: Tensor) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not last:
        x = x.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=torch.uint8, device=x.device)
    with native.on(x):
        native.cuda.pack_uint8(
            x.data_ptr(), codes.DTYPES[x.dtype], batch, channels, height * width, last, out.data_ptr(), native.stream(x)
        )
    return out
