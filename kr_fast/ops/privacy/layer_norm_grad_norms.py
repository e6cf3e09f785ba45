"""Norms of a layer norm's per-sample gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import LayerNormGradients
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import empty_norms, kernel

_OP = "layer_norm_grad_norms"
SCHEMA = "(Tensor x, Tensor grad_output, float eps, bool bias, int multiplicity)"


@define(f"{_OP}{SCHEMA} -> Tensor", fake=empty_norms)
def _impl(x, grad_output, *options):
    if not x.numel():
        return empty_norms(x, grad_output, *options).zero_()
    return kernel(_OP, x, grad_output)(LayerNormGradients(x, grad_output, *options))


def layer_norm_grad_norms(
    x: Tensor,
    grad_output: Tensor,
    normalized_shape: int | Sequence[int],
    *,
    eps: float = 1e-5,
    bias: bool = True,
    multiplicity: int = 1,
) -> Tensor:
    """L2 norms of the gradients of a ``torch.nn.LayerNorm``'s parameters, one for each record of a batch.

    ``norms[b]^2 = sum_d dw_b[d]^2``, with ``bias`` ``+ sum_d db_b[d]^2``, where ``dw_b[d] = sum_{r, t} dy[r, t, d]
    n[r, t, d]`` and ``db_b[d] = sum_{r, t} dy[r, t, d]`` over the rows ``r`` of record ``b`` and all positions ``t``,
    and ``n = (x - mean) / sqrt(var + eps)``. Sums are in float32 at least. There is no derivative of the norms:
    backward through them raises.

    Args:
        x: what the layer read, before the norm, ``[R, *, *normalized_shape]``; float32, bfloat16, float16 or float64.
        grad_output: the loss's gradient by what it made, of ``x``'s shape, of a loss that sums over records.
        normalized_shape: of the layer: how many values are normalised together, or the shape of their dimensions.
        eps: of the layer.
        bias: whether the norm is of weight and bias together, or of the weight.
        multiplicity: K consecutive rows belong to one record, whose gradient is the sum of theirs: ``B = R / K``.
    Returns: ``[B]`` float32, or float64 where an input is.
    Raises: TypeError or ValueError naming the argument.
    """
    values = checks.layer_norm(_OP, x, grad_output, normalized_shape, eps, bias, multiplicity)
    return call(torch.ops.kr_fast.layer_norm_grad_norms.default, *values)
