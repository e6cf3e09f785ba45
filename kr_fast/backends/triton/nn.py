"""Kernels of the family ``nn`` in ``kr_fast.kernels``."""

from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.arguments import BatchNormAct, BatchNormActGradient, GroupNorm, GroupNormGradient


def _group_norm(call: GroupNorm, y: Tensor, mean: Tensor | None, rstd: Tensor | None) -> None:
    from kr_fast.kernels.nn import group_norm_silu as kernels

    with native.on(y):
        kernels.group_norm_silu(call, y, mean, rstd)


def _group_norm_backward(call: GroupNormGradient) -> tuple[Tensor | None, ...]:
    from kr_fast.kernels.nn import group_norm_silu_backward as kernels

    with native.on(call.grad):
        return kernels.backward(call)


registry.differentiable(
    "group_norm_silu",
    "triton",
    registry.Differentiable(_group_norm, _group_norm_backward),
    refuses=native.triton_tensors(*codes.DTYPES),
)


def _batch_norm(call: BatchNormAct) -> tuple[Tensor, Tensor, Tensor]:
    from kr_fast.kernels.nn import batch_norm_act as kernels

    with native.on(call.x):
        return kernels.forward(call)


def _batch_norm_backward(call: BatchNormActGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kr_fast.kernels.nn import batch_norm_act as kernels

    with native.on(call.x):
        return kernels.backward(call)


registry.differentiable(
    "batch_norm_act",
    "triton",
    registry.Differentiable(_batch_norm, _batch_norm_backward),
    refuses=native.triton_tensors(*codes.DTYPES),
)
