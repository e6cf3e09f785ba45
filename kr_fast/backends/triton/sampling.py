"""Kernels of the family ``sampling`` in ``kr_fast.kernels``."""

import torch

from kr_fast.backends import native, registry
from kr_fast.backends.arguments import SolverStep, in_one_layout


@registry.kernel("philox_normal", "triton", refuses=native.triton_tensors(torch.float32))
def philox_normal(ids, numel, *, seed, stream):
    from kr_fast.kernels.sampling import philox_normal as kernels

    with native.on(ids):
        return kernels.philox_normal(ids, numel, seed, stream)


@registry.kernel("pack_uint8", "triton", refuses=native.triton_tensors(torch.float32, torch.bfloat16, torch.float16))
def pack_uint8(x):
    from kr_fast.kernels.sampling import pack_uint8 as kernels

    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    with native.on(x):
        return kernels.pack_uint8(x if last else x.contiguous(), last)


@registry.kernel("solver_step", "triton", refuses=native.triton_tensors(torch.float32))
def solver_step(step: SolverStep) -> None:
    from kr_fast.kernels.sampling import solver_step as kernels

    step, last = in_one_layout(step)
    with native.on(step.sample):
        kernels.solver_step(step, last)
