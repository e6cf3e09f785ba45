"""Norms of a group norm's per-sample gradients."""

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import GroupNormGradients
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import empty_norms, kernel

_OP = "group_norm_grad_norms"
SCHEMA = "(Tensor x, Tensor grad_output, int groups, float eps, int multiplicity)"


@define(f"{_OP}{SCHEMA} -> Tensor", fake=empty_norms)
def _impl(x, grad_output, *options):
    if not x.numel():
        return empty_norms(x, grad_output, *options).zero_()
    return kernel(_OP, x, grad_output)(GroupNormGradients(x, grad_output, *options))


def group_norm_grad_norms(
    x: Tensor, grad_output: Tensor, groups: int, *, eps: float = 1e-5, multiplicity: int = 1
) -> Tensor:
    """L2 norms of the gradients of a ``torch.nn.GroupNorm``'s weight and bias together, one for each record of a batch.

    ``norms[b]^2 = sum_c dw_b[c]^2 + db_b[c]^2`` with ``dw_b[c] = sum_{r, t} dy[r, c, t] n[r, c, t]`` and ``db_b[c] =
    sum_{r, t} dy[r, c, t]`` over the rows ``r`` of record ``b`` and all pixels ``t``, where ``n = (x - mean_g) /
    sqrt(var_g + eps)``. Sums are in float32 at least. There is no derivative of the norms: backward through them
    raises. ``groups = C`` is instance norm.

    Args:
        x: what the layer read, before the norm, ``[R, C, *]`` in any layout; float32, bfloat16, float16 or float64.
        grad_output: the loss's gradient by what it made, of ``x``'s shape, of a loss that sums over records.
        groups: of the layer, a divisor of C.
        eps: of the layer.
        multiplicity: K consecutive rows belong to one record, whose gradient is the sum of theirs: ``B = R / K``.
    Returns: ``[B]`` float32, or float64 where an input is.
    Raises: TypeError or ValueError naming the argument.
    """
    values = checks.group_norm(_OP, x, grad_output, groups, eps, multiplicity)
    return call(torch.ops.kr_fast.group_norm_grad_norms.default, *values)
