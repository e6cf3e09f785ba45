"""Kernels of the family ``nn`` in ``kr_fast.kernels``."""

from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.arguments import GroupNorm
from kr_fast.backends.calls import GroupNormCall


def _group_norm(call: GroupNorm, y: Tensor, mean: None, rstd: None) -> None:
    from kr_fast.kernels.nn import group_norm_silu as kernels

    with native.on(y):
        kernels.group_norm_silu(call, y)


def _refuses_group_norm(call: GroupNormCall) -> str | None:
    reason = native.triton_tensors(*codes.DTYPES)(call)
    return reason or ("there is no gradient in Triton" if call.trains else None)


registry.differentiable(
    "group_norm_silu", "triton", registry.Differentiable(_group_norm, None), refuses=_refuses_group_norm
)
