"""Kernels of the family ``nn`` in ``kr_fast.kernels``."""

from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.arguments import GroupNorm


@registry.kernel("group_norm_silu", "triton", refuses=native.triton_tensors(*codes.DTYPES))
def group_norm_silu(call: GroupNorm, y: Tensor) -> None:
    from kr_fast.kernels.nn import group_norm_silu as kernels

    with native.on(y):
        kernels.group_norm_silu(call, y)
