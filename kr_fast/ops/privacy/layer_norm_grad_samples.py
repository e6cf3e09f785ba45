"""A layer norm's per-sample gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends.privacy_arguments import LayerNormGradients, accumulated
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import kernel
from kr_fast.ops.privacy.layer_norm_grad_norms import SCHEMA

_OP = "layer_norm_grad_samples"


def _empty(x, grad_output, eps, bias, multiplicity) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0] // multiplicity, x.shape[2]), accumulated(x, grad_output)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if bias else (0,), dtype=dtype)


@define(f"{_OP}{SCHEMA} -> (Tensor, Tensor)", fake=_empty)
def _impl(x, grad_output, *options):
    if not x.numel():
        weight, of_bias = _empty(x, grad_output, *options)
        return weight.zero_(), of_bias.zero_()
    weight, of_bias = kernel(_OP, x, grad_output)(LayerNormGradients(x, grad_output, *options))
    return weight, weight.new_empty(0) if of_bias is None else of_bias


def layer_norm_grad_samples(
    x: Tensor,
    grad_output: Tensor,
    normalized_shape: int | Sequence[int],
    *,
    eps: float = 1e-5,
    bias: bool = True,
    multiplicity: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a ``torch.nn.LayerNorm``'s parameters, one for each record of a batch.

    ``dw_b`` and ``db_b`` of :func:`kr_fast.layer_norm_grad_norms`, from one read of ``x`` and ``grad_output``, which
    are then free. There is no derivative: backward raises.

    Args:
        x: as for :func:`kr_fast.layer_norm_grad_norms`, as are all arguments.
        grad_output: see ``x``.
        normalized_shape: see ``x``.
        eps: see ``x``.
        bias: whether to return the bias's as well.
        multiplicity: see ``x``.
    Returns: ``[B, *normalized_shape]`` float32, or float64 where an input is; and the same, or None without ``bias``.
    Raises: TypeError or ValueError naming the argument.
    """
    values = checks.layer_norm(_OP, x, grad_output, normalized_shape, eps, bias, multiplicity)
    weight, of_bias = call(torch.ops.kr_fast.layer_norm_grad_samples.default, *values)
    last = len(normalized_shape) if isinstance(normalized_shape, Sequence) else 1
    shape = weight.shape[0], *x.shape[x.ndim - last :]
    return weight.view(shape), of_bias.view(shape) if bias else None
