"""Norms of an embedding's per-sample gradients."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.backends.privacy_arguments import EmbeddingGradients
from kr_fast.ops import _check
from kr_fast.ops._library import call, define
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.dispatch import empty_norms

_OP = "embedding_grad_norms"


@define(f"{_OP}(Tensor indices, Tensor grad_output, int? padding_idx, int multiplicity) -> Tensor", fake=empty_norms)
def _impl(indices, grad_output, padding_idx, multiplicity):
    if not grad_output.numel():
        return empty_norms(indices, grad_output, padding_idx, multiplicity).zero_()
    kernel = registry.resolve(_OP, Call(grad_output.device.type, grad_output.dtype))
    return kernel(EmbeddingGradients(indices, grad_output, padding_idx, multiplicity))


def embedding_grad_norms(
    indices: Tensor, grad_output: Tensor, *, padding_idx: int | None = None, multiplicity: int = 1
) -> Tensor:
    """L2 norms of the gradients of a ``torch.nn.Embedding``'s weight, one for each record of a batch.

    ``norms[b]^2 = sum_v |sum_{(r, t): indices[r, t] = v} dy[r, t]|^2`` over the rows ``r`` of record ``b`` and all
    positions ``t``, but for ``v = padding_idx``: an index that a record holds twice adds before it is squared. Sums are
    in float32 at least. There is no derivative of the norms: backward through them raises.

    Args:
        indices: ``[R, *]`` of an integer dtype, at least 0 (which is not checked).
        grad_output: the loss's gradient by what the layer made, ``[R, *, D]`` float32, bfloat16, float16 or float64, of
            a loss that sums over records.
        padding_idx: the index without a gradient, at least 0, or None. ``scale_grad_by_freq`` is not known here: it
            divides by counts over the whole batch, so that a record's gradient depends on the others.
        multiplicity: K consecutive rows belong to one record, whose gradient is the sum of theirs: ``B = R / K``.
    Returns: ``[B]`` float32, or float64 of float64.
    Raises: TypeError or ValueError naming the argument.
    """
    _check.tensor(_OP, "indices", indices, dtypes=_check.INTEGERS)
    _check.tensor(_OP, "grad_output", grad_output, dtypes=_check.FLOATING)
    if indices.ndim < 1:
        _check.fail(_OP, "indices", "have at least 1 dimension", indices)
    if grad_output.shape[:-1] != indices.shape or grad_output.device != indices.device:
        rule = f"be [{', '.join(map(str, indices.shape))}, D] on {indices.device}"
        _check.fail(_OP, "grad_output", rule, grad_output)
    if padding_idx is not None:
        padding_idx = _check.integer(_OP, "padding_idx", padding_idx, 0, 2**63)
    multiplicity = checks.records(_OP, indices.shape[0], multiplicity)
    indices = _check.integers(_OP, "indices", indices)
    indices = indices.reshape(indices.shape[0], indices.shape[1:].numel())
    operands = indices, checks.positions(grad_output), padding_idx, multiplicity
    return call(torch.ops.kr_fast.embedding_grad_norms.default, *operands)
