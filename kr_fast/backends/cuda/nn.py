"""Kernels of the family ``nn`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.native import address


@registry.kernel("group_norm_silu", "cuda", refuses=native.cuda_tensors(*codes.DTYPES))
def group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu) -> Tensor:
    batch, channels, height, width = x.shape
    more = 0 if skip is None else skip.shape[1]
    shape = (batch, channels + more, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    affine = weight if bias is None else bias
    with native.on(x):
        native.cuda.group_norm_silu(
            x.data_ptr(), address(skip), batch, height * width, channels, more, codes.DTYPES[x.dtype],
            address(weight), address(bias), 0 if affine is None else codes.DTYPES[affine.dtype],
            address(shift), 0 if shift is None else codes.DTYPES[shift.dtype], 0 if shift is None else shift.stride(0),
            groups, eps, silu, y.data_ptr(), native.stream(x),
        )  # fmt: skip
    return y
