"""Kernels of the family ``nn`` in ``kr_fast.kernels``."""

import torch

from kr_fast.backends import native, registry


@registry.kernel(
    "group_norm_silu", "triton", refuses=native.triton_tensors(torch.float32, torch.bfloat16, torch.float16)
)
def group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu):
    from kr_fast.kernels.nn import group_norm_silu as kernels

    with native.on(x):
        return kernels.group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu)
