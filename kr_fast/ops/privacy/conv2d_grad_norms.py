"""Norms of a convolution's per-sample gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import ConvGradients
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import empty_norms, kernel

_OP = "conv2d_grad_norms"
SCHEMA = (
    "(Tensor x, Tensor grad_output, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "bool bias, int multiplicity)"
)


def arguments(x, grad_output, kernel_size, stride, padding, dilation, groups, bias, multiplicity) -> ConvGradients:
    """Of the op's arguments, as the dispatcher gives them."""
    pairs = (tuple(each) for each in (kernel_size, stride, padding, dilation))
    return ConvGradients(x, grad_output, *pairs, groups, bias, multiplicity)


@define(f"{_OP}{SCHEMA} -> Tensor", fake=empty_norms)
def _impl(x, grad_output, *options):
    if not x.shape[0]:
        return empty_norms(x, grad_output, *options)
    return kernel(_OP, x, grad_output)(arguments(x, grad_output, *options))


def conv2d_grad_norms(
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
) -> Tensor:
    """L2 norms of the gradients of a ``torch.nn.Conv2d``'s parameters, one for each record of a batch.

    ``norms[b]^2 = sum_{o, c, k, l} dw_b[o, c, k, l]^2``, with ``bias`` ``+ sum_o db_b[o]^2``, where ``dw_b[o, c, k, l]
    = sum_{r, i, j} x[r, c, i s - p + k d, j s - p + l d] dy[r, o, i, j]`` and ``db_b[o] = sum_{r, i, j} dy[r, o, i,
    j]`` over the rows ``r`` of record ``b``. ``[B, parameters]`` is never in memory. Sums are in float32 at least.
    There is no derivative of the norms: backward through them raises.

    Args:
        x: what the layer read, ``[R, I, H, W]`` in any layout; float32, bfloat16, float16 or float64. Of a layer with
            another ``padding_mode`` than zeros: the padded image, and ``padding=0`` here.
        grad_output: the loss's gradient by what it made, ``[R, O, H', W']``, of a loss that sums over records.
        kernel_size: one number or a pair, vertical and horizontal.
        stride: as the layer has it, as are ``padding`` (also "same" and "valid"), ``dilation`` and ``groups``.
        padding: see ``stride``.
        dilation: see ``stride``.
        groups: see ``stride``.
        bias: whether the norm is of weight and bias together.
        multiplicity: K consecutive rows belong to one record, whose gradient is the sum of theirs: ``B = R / K``.
    Returns: ``[B]`` float32, or float64 where an input is.
    Raises: TypeError or ValueError naming the argument.
    Source: Goodfellow, "Efficient Per-Example Gradient Computations", 2015; for convolutions Rochette et al., 2019,
        arXiv:1912.06015, and Bu et al., "Scalable and Efficient Training of Large Convolutional Neural Networks with
        Differential Privacy", NeurIPS 2022, which chooses between the gradient and the Gram matrix by counting.
    """
    values = checks.convolution(_OP, x, grad_output, kernel_size, stride, padding, dilation, groups, bias, multiplicity)
    return call(torch.ops.kr_fast.conv2d_grad_norms.default, *values)
