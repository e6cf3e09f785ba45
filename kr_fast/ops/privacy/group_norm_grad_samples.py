"""A group norm's per-sample gradients."""

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import GroupNormGradients, accumulated
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import kernel
from kr_fast.ops.privacy.group_norm_grad_norms import SCHEMA

_OP = "group_norm_grad_samples"


def _empty(x, grad_output, groups, eps, multiplicity) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0] // multiplicity, x.shape[1]), accumulated(x, grad_output)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@define(f"{_OP}{SCHEMA} -> (Tensor, Tensor)", fake=_empty)
def _impl(x, grad_output, *options):
    if not x.numel():
        weight, bias = _empty(x, grad_output, *options)
        return weight.zero_(), bias.zero_()
    return kernel(_OP, x, grad_output)(GroupNormGradients(x, grad_output, *options))


def group_norm_grad_samples(
    x: Tensor, grad_output: Tensor, groups: int, *, eps: float = 1e-5, multiplicity: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradients of a ``torch.nn.GroupNorm``'s weight and bias, one for each record of a batch.

    ``dw_b`` and ``db_b`` of :func:`kr_fast.group_norm_grad_norms`, from one read of ``x`` and ``grad_output``, which
    are then free. There is no derivative: backward raises.

    Args:
        x: as for :func:`kr_fast.group_norm_grad_norms`, as are all arguments.
        grad_output: see ``x``.
        groups: see ``x``.
        eps: see ``x``.
        multiplicity: see ``x``.
    Returns: ``[B, C]`` each, float32, or float64 where an input is.
    Raises: TypeError or ValueError naming the argument.
    """
    values = checks.group_norm(_OP, x, grad_output, groups, eps, multiplicity)
    return call(torch.ops.kr_fast.group_norm_grad_samples.default, *values)
