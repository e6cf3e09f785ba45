"""Kernels of the family ``nn`` in ``kr_fast._cuda``."""

from torch import Tensor

from kr_fast.backends import codes, native, registry, structs
from kr_fast.backends.arguments import GroupNorm


@registry.kernel("group_norm_silu", "cuda", refuses=native.cuda_tensors(*codes.DTYPES))
def group_norm_silu(call: GroupNorm, y: Tensor) -> None:
    with native.on(y):
        native.cuda.group_norm_silu(structs.group_norm(call, y), native.stream(y))
