"""Kernels of the family ``nn`` in ``kr_fast._cuda``."""

from torch import Tensor

from kr_fast.backends import codes, native, registry, structs
from kr_fast.backends.arguments import GroupNorm
from kr_fast.backends.calls import GroupNormCall


def _group_norm(call: GroupNorm, y: Tensor, mean: None, rstd: None) -> None:
    with native.on(y):
        native.cuda.group_norm_silu(structs.group_norm(call, y), native.stream(y))


def _refuses_group_norm(call: GroupNormCall) -> str | None:
    reason = native.cuda_tensors(*codes.DTYPES)(call)
    return reason or ("there is no gradient in CUDA C++" if call.trains else None)


registry.differentiable(
    "group_norm_silu", "cuda", registry.Differentiable(_group_norm, None), refuses=_refuses_group_norm
)
