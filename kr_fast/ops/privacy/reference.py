"""Per-sample gradients of parameters in plain torch: the definitions, in float32 or, of float64, in float64.

A record's gradient is the sum over its ``multiplicity`` consecutive rows; a norm is the root of the sum of the squares,
which are summed in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kr_fast.backends.exact import float32_products
from kr_fast.backends.privacy_arguments import (
    ConvGradients,
    EmbeddingGradients,
    GroupNormGradients,
    LayerNormGradients,
    LinearGradients,
    accumulated,
    records,
)
from kr_fast.backends.registry import kernel, never


def _norm(*gradients: Tensor) -> Tensor:
    """``[B]`` of gradients ``[B, ...]``."""
    squares = [each.flatten(1).double().square().sum(1) for each in gradients]
    return sum(squares).sqrt().to(gradients[0].dtype)


def _sum_over(values: Tensor, multiplicity: int) -> Tensor:
    """``[B, ...]`` of ``[B * multiplicity, ...]``."""
    return values.unflatten(0, (len(values) // multiplicity, multiplicity)).sum(1)


@kernel("conv2d_grad_samples", "reference", refuses=never)
@float32_products()
def conv2d_grad_samples(call: ConvGradients) -> tuple[Tensor, Tensor | None]:
    """``dw[b, o, c, k, l] = sum_{rows of b, i, j} x[c, i s - p + k d, j s - p + l d] dy[o, i, j]``, by unfolding."""
    x, grad = (each.to(accumulated(*call[:2])) for each in call[:2])
    (top, left), (rows, columns), count = call.padding, call.padded(), records(call)
    x = F.pad(x, (left, columns - left - x.shape[3], top, rows - top - x.shape[2]))
    taps = F.unfold(x, call.kernel_size, call.dilation, 0, call.stride)  # [R, C K L, T]
    taps, outputs = (
        each.reshape(count, call.multiplicity, call.groups, each.shape[1] // call.groups, -1) for each in (taps, grad)
    )
    weight = torch.einsum("bmgot,bmgit->bgoi", outputs, taps)
    bias = _sum_over(grad.sum((2, 3)), call.multiplicity) if call.bias else None
    return weight.reshape(count, *call.weight_shape), bias


@kernel("conv2d_grad_norms", "reference", refuses=never)
def conv2d_grad_norms(call: ConvGradients) -> Tensor:
    return _norm(*(each for each in conv2d_grad_samples(call) if each is not None))


@kernel("linear_grad_samples", "reference", refuses=never)
@float32_products()
def linear_grad_samples(call: LinearGradients) -> tuple[Tensor, Tensor | None]:
    """``dw[b, o, i] = sum_{rows of b, t} dy[t, o] x[t, i]``."""
    x, grad = (
        each.to(accumulated(*call[:2])).unflatten(0, (len(each) // call.multiplicity, call.multiplicity))
        for each in call[:2]
    )
    return torch.einsum("bmto,bmti->boi", grad, x), grad.sum((1, 2)) if call.bias else None


@kernel("linear_grad_norms", "reference", refuses=never)
def linear_grad_norms(call: LinearGradients) -> Tensor:
    return _norm(*(each for each in linear_grad_samples(call) if each is not None))


@kernel("embedding_grad_norms", "reference", refuses=never)
def embedding_grad_norms(call: EmbeddingGradients) -> Tensor:
    """Each record's sums over the places of each index that it holds; the other rows of its gradient are 0."""
    grad = call.grad_output.to(accumulated(call.grad_output))
    record = torch.arange(records(call), device=grad.device).repeat_interleave(grad.shape[1] * call.multiplicity)
    pairs, where = torch.unique(torch.stack([record, call.indices.reshape(-1)]), dim=1, return_inverse=True)
    sums = grad.new_zeros(pairs.shape[1], grad.shape[2]).index_add_(0, where, grad.flatten(0, 1))
    if call.padding_idx is not None:
        sums[pairs[1] == call.padding_idx] = 0
    squares = sums.double().square().sum(1)
    return squares.new_zeros(records(call)).index_add_(0, pairs[0], squares).sqrt().to(grad.dtype)


@kernel("group_norm_grad_samples", "reference", refuses=never)
def group_norm_grad_samples(call: GroupNormGradients) -> tuple[Tensor, Tensor]:
    """``dw = sum dy n`` and ``db = sum dy`` over pixels, with ``n`` the normalised ``x``."""
    x, grad = (each.to(accumulated(*call[:2])).reshape(*each.shape[:2], -1) for each in call[:2])
    grouped = x.reshape(len(x), call.groups, x.shape[1] // call.groups, x.shape[2])
    variance, mean = torch.var_mean(grouped, (2, 3), correction=0, keepdim=True)
    normalised = ((grouped - mean) * (variance + call.eps).rsqrt()).view(x.shape)
    weight, bias = (_sum_over(each.sum(2), call.multiplicity) for each in (grad * normalised, grad))
    return weight, bias


@kernel("group_norm_grad_norms", "reference", refuses=never)
def group_norm_grad_norms(call: GroupNormGradients) -> Tensor:
    return _norm(*group_norm_grad_samples(call))


@kernel("layer_norm_grad_samples", "reference", refuses=never)
def layer_norm_grad_samples(call: LayerNormGradients) -> tuple[Tensor, Tensor | None]:
    """``dw = sum_t dy n`` and, with ``bias``, ``db = sum_t dy``, with ``n`` the normalised ``x``."""
    x, grad = (each.to(accumulated(*call[:2])) for each in call[:2])
    variance, mean = torch.var_mean(x, 2, correction=0, keepdim=True)
    weight = _sum_over((grad * ((x - mean) * (variance + call.eps).rsqrt())).sum(1), call.multiplicity)
    return weight, _sum_over(grad.sum(1), call.multiplicity) if call.bias else None


@kernel("layer_norm_grad_norms", "reference", refuses=never)
def layer_norm_grad_norms(call: LayerNormGradients) -> Tensor:
    return _norm(*(each for each in layer_norm_grad_samples(call) if each is not None))
