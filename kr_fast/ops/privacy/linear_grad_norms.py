"""Norms of a linear layer's per-sample gradients."""

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import LinearGradients
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import empty_norms, kernel

_OP = "linear_grad_norms"


@define(f"{_OP}(Tensor x, Tensor grad_output, bool bias, int multiplicity) -> Tensor", fake=empty_norms)
def _impl(x, grad_output, bias, multiplicity):
    if not x.numel() or not grad_output.numel():
        return empty_norms(x, grad_output, bias, multiplicity).zero_()
    return kernel(_OP, x, grad_output)(LinearGradients(x, grad_output, bias, multiplicity))


def linear_grad_norms(x: Tensor, grad_output: Tensor, *, bias: bool = False, multiplicity: int = 1) -> Tensor:
    """L2 norms of the gradients of a ``torch.nn.Linear``'s parameters, one for each record of a batch.

    ``norms[b]^2 = sum_{o, i} dw_b[o, i]^2``, with ``bias`` ``+ sum_o db_b[o]^2``, where ``dw_b[o, i] = sum_{r, t}
    dy[r, t, o] x[r, t, i]`` and ``db_b[o] = sum_{r, t} dy[r, t, o]`` over the rows ``r`` of record ``b`` and all
    positions ``t``. ``[B, parameters]`` is never in memory. Sums are in float32 at least. There is no derivative of the
    norms: backward through them raises.

    Args:
        x: what the layer read, ``[R, *, I]``; float32, bfloat16, float16 or float64.
        grad_output: the loss's gradient by what it made, ``[R, *, O]``, of a loss that sums over records.
        bias: whether the norm is of weight and bias together.
        multiplicity: K consecutive rows belong to one record, whose gradient is the sum of theirs: ``B = R / K``.
    Returns: ``[B]`` float32, or float64 where an input is.
    Raises: TypeError or ValueError naming the argument.
    Source: Goodfellow, "Efficient Per-Example Gradient Computations", 2015; of sequences Li et al., "Large Language
        Models Can Be Strong Differentially Private Learners", ICLR 2022, section 4 (the Gram form).
    """
    return call(torch.ops.kr_fast.linear_grad_norms.default, *checks.linear(_OP, x, grad_output, bias, multiplicity))
