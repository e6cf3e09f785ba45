"""A convolution's per-sample gradients, for layers that have fewer parameters than pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import accumulated, records
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.conv2d_grad_norms import SCHEMA, arguments
from kr_fast.ops.privacy.dispatch import kernel

_OP = "conv2d_grad_samples"


def _empty(x, grad_output, *options) -> tuple[Tensor, Tensor]:
    values, dtype = arguments(x, grad_output, *options), accumulated(x, grad_output)
    weight = x.new_empty((records(values), *values.weight_shape), dtype=dtype)
    return weight, x.new_empty(weight.shape[:2] if values.bias else (0,), dtype=dtype)


@define(f"{_OP}{SCHEMA} -> (Tensor, Tensor)", fake=_empty)
def _impl(x, grad_output, *options):
    if not x.shape[0]:
        return _empty(x, grad_output, *options)
    weight, bias = kernel(_OP, x, grad_output)(arguments(x, grad_output, *options))
    return weight, weight.new_empty(0) if bias is None else bias


def conv2d_grad_samples(
    x: Tensor,
    grad_output: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
    multiplicity: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a ``torch.nn.Conv2d``'s parameters, one for each record of a batch.

    ``dw_b`` and ``db_b`` of :func:`kr_fast.conv2d_grad_norms`, which is for layers where these are too many to keep.
    Where a layer has fewer parameters than values in a row of ``x`` and ``grad_output``, keeping them frees both, and
    the sum of clipped gradients is a product of a vector and a matrix. There is no derivative: backward raises.

    Args:
        x: as for :func:`kr_fast.conv2d_grad_norms`, as are all arguments.
        grad_output: see ``x``.
        kernel_size: see ``x``.
        stride: see ``x``.
        padding: see ``x``.
        dilation: see ``x``.
        groups: see ``x``.
        bias: whether to return the bias's as well.
        multiplicity: see ``x``.
    Returns: ``[B, O, I / groups, K, L]`` float32, or float64 where an input is; and ``[B, O]`` alike, or None without
        ``bias``.
    Raises: TypeError or ValueError naming the argument.
    """
    values = checks.convolution(_OP, x, grad_output, kernel_size, stride, padding, dilation, groups, bias, multiplicity)
    weight, of_bias = call(torch.ops.kr_fast.conv2d_grad_samples.default, *values)
    return weight, of_bias if bias else None
