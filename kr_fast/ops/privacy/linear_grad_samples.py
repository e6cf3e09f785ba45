"""A linear layer's per-sample gradients."""

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import LinearGradients, accumulated
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import kernel

_OP = "linear_grad_samples"


def _empty(x, grad_output, bias, multiplicity) -> tuple[Tensor, Tensor]:
    (records, dtype), outputs = (x.shape[0] // multiplicity, accumulated(x, grad_output)), grad_output.shape[2]
    weight = x.new_empty((records, outputs, x.shape[2]), dtype=dtype)
    return weight, x.new_empty((records, outputs) if bias else (0,), dtype=dtype)


@define(f"{_OP}(Tensor x, Tensor grad_output, bool bias, int multiplicity) -> (Tensor, Tensor)", fake=_empty)
def _impl(x, grad_output, bias, multiplicity):
    if not x.numel() or not grad_output.numel():
        return tuple(each.zero_() for each in _empty(x, grad_output, bias, multiplicity))
    weight, of_bias = kernel(_OP, x, grad_output)(LinearGradients(x, grad_output, bias, multiplicity))
    return weight, weight.new_empty(0) if of_bias is None else of_bias


def linear_grad_samples(
    x: Tensor, grad_output: Tensor, *, bias: bool = False, multiplicity: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a ``torch.nn.Linear``'s parameters, one for each record of a batch.

    ``dw_b`` and ``db_b`` of :func:`kr_fast.linear_grad_norms`, for layers where these are few. There is no derivative:
    backward raises.

    Args:
        x: as for :func:`kr_fast.linear_grad_norms`, as are all arguments.
        grad_output: see ``x``.
        bias: whether to return the bias's as well.
        multiplicity: see ``x``.
    Returns: ``[B, O, I]`` float32, or float64 where an input is; and ``[B, O]``, or None without ``bias``.
    Raises: TypeError or ValueError naming the argument.
    """
    values = checks.linear(_OP, x, grad_output, bias, multiplicity)
    weight, of_bias = call(torch.ops.kr_fast.linear_grad_samples.default, *values)
    return weight, of_bias if bias else None
