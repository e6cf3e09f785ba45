"""Kernels of the family ``privacy`` in ``kr_fast.kernels``."""

from typing import TypeVar

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.privacy_arguments import ConvGradients, GroupNormGradients, LinearGradients

Gradients = TypeVar("Gradients", ConvGradients, GroupNormGradients, LinearGradients)
_TAKES = native.triton_tensors(*codes.DTYPES)


def _prepared(op: str, call: Gradients) -> Gradients:
    """Both tensors of one dtype, contiguous or channels_last."""
    dtype, tensors = torch.promote_types(call.x.dtype, call.grad_output.dtype), []
    for name, value in (("x", call.x), ("grad_output", call.grad_output)):
        if call.multiplicity * value.shape[1:].numel() >= 2**31:  # offsets within a record are 32-bit
            raise ValueError(f"{op}: {name} must have fewer than 2^31 elements a record, got {list(value.shape)}")
        last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
        tensors.append(value.to(dtype) if last else value.to(dtype).contiguous())
    return call._replace(x=tensors[0], grad_output=tensors[1])


@registry.kernel("conv2d_grad_norms", "triton", refuses=_TAKES)
def conv2d_grad_norms(call: ConvGradients) -> Tensor:
    from kr_fast.kernels.privacy import conv2d_grad_norms as kernels

    with native.on(call.x):
        return kernels.conv2d_grad_norms(_prepared("conv2d_grad_norms", call))


@registry.kernel("conv2d_grad_samples", "triton", refuses=_TAKES)
def conv2d_grad_samples(call: ConvGradients) -> tuple[Tensor, Tensor | None]:
    from kr_fast.kernels.privacy import conv2d_grad_norms as kernels

    with native.on(call.x):
        return kernels.conv2d_grad_samples(_prepared("conv2d_grad_samples", call))


@registry.kernel("linear_grad_norms", "triton", refuses=_TAKES)
def linear_grad_norms(call: LinearGradients) -> Tensor:
    from kr_fast.kernels.privacy import linear_grad_norms as kernels

    with native.on(call.x):
        return kernels.linear_grad_norms(_prepared("linear_grad_norms", call))


@registry.kernel("linear_grad_samples", "triton", refuses=_TAKES)
def linear_grad_samples(call: LinearGradients) -> tuple[Tensor, Tensor | None]:
    from kr_fast.kernels.privacy import linear_grad_norms as kernels

    with native.on(call.x):
        return kernels.linear_grad_samples(_prepared("linear_grad_samples", call))


def _as_images(call: GroupNormGradients) -> GroupNormGradients:
    """``[R, C, H, W]`` of ``[R, C, *]``."""
    if call.x.ndim == 4:
        return call
    shape = (*call.x.shape[:2], 1, -1)
    return call._replace(x=call.x.reshape(shape), grad_output=call.grad_output.reshape(shape))


@registry.kernel("group_norm_grad_norms", "triton", refuses=_TAKES)
def group_norm_grad_norms(call: GroupNormGradients) -> Tensor:
    from kr_fast.kernels.privacy import group_norm_grad_norms as kernels

    with native.on(call.x):
        return kernels.group_norm_grad_norms(_prepared("group_norm_grad_norms", _as_images(call)))


@registry.kernel("group_norm_grad_samples", "triton", refuses=_TAKES)
def group_norm_grad_samples(call: GroupNormGradients) -> tuple[Tensor, Tensor]:
    from kr_fast.kernels.privacy import group_norm_grad_norms as kernels

    with native.on(call.x):
        return kernels.group_norm_grad_samples(_prepared("group_norm_grad_samples", _as_images(call)))
