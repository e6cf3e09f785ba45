"""Kernels of the family ``privacy`` in ``kr_fast._cpu``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, privacy_structs, registry
from kr_fast.backends.privacy_arguments import (
    ConvGradients,
    EmbeddingGradients,
    GroupNormGradients,
    LayerNormGradients,
    LinearGradients,
    records,
)

_TAKES = native.cpu_tensors(*codes.DTYPES)


def _conv(call: ConvGradients, norms: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Into those of ``norms``, ``weight`` and ``bias`` that there are, from float32 in channels_last."""
    x, grad = (each.float().contiguous(memory_format=torch.channels_last) for each in call[:2])
    fields = privacy_structs.conv(call._replace(x=x, grad_output=grad), norms, weight, bias)
    native.cpu.conv2d_grad_norms(fields, torch.get_num_threads())


@registry.kernel("conv2d_grad_norms", "cpu", refuses=_TAKES)
def conv2d_grad_norms(call: ConvGradients) -> Tensor:
    norms = native.empty(records(call))
    _conv(call, norms, None, None)
    return norms


@registry.kernel("conv2d_grad_samples", "cpu", refuses=_TAKES)
def conv2d_grad_samples(call: ConvGradients, norms: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weights and biases by record; into ``norms`` ``[B]`` those of both, taken while they are in the cache."""
    weight = native.empty(records(call), *call.weight_shape)
    bias = native.empty(*weight.shape[:2]) if call.bias else None
    _conv(call, norms, weight, bias)
    return weight, bias


def _linear(call: LinearGradients, norms: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Into those of ``norms``, ``weight`` and ``bias`` that there are, from float32."""
    x, grad = (each.float().contiguous() for each in call[:2])
    fields = privacy_structs.linear(call._replace(x=x, grad_output=grad), norms, weight, bias)
    native.cpu.linear_grad_norms(fields, torch.get_num_threads())


@registry.kernel("linear_grad_norms", "cpu", refuses=_TAKES)
def linear_grad_norms(call: LinearGradients) -> Tensor:
    norms = native.empty(records(call))
    _linear(call, norms, None, None)
    return norms


@registry.kernel("linear_grad_samples", "cpu", refuses=_TAKES)
def linear_grad_samples(call: LinearGradients, norms: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """As :func:`conv2d_grad_samples`."""
    weight = native.empty(records(call), call.grad_output.shape[2], call.x.shape[2])
    bias = native.empty(*weight.shape[:2]) if call.bias else None
    _linear(call, norms, weight, bias)
    return weight, bias


def _in_one_layout(call: GroupNormGradients) -> GroupNormGradients:
    """Both tensors of one dtype, with the channels of a pixel side by side in both or in neither."""
    dtype = torch.promote_types(call.x.dtype, call.grad_output.dtype)
    last = torch.channels_last if call.x.ndim == 4 and not call.x.is_contiguous() else torch.contiguous_format
    tensors = (each.to(dtype).contiguous(memory_format=last) for each in call[:2])
    return call._replace(**dict(zip(("x", "grad_output"), tensors, strict=True)))


@registry.kernel("group_norm_grad_norms", "cpu", refuses=_TAKES)
def group_norm_grad_norms(call: GroupNormGradients) -> Tensor:
    norms, call = native.empty(records(call)), _in_one_layout(call)
    native.cpu.group_norm_grad_norms(privacy_structs.group_norm(call, norms, None, None), torch.get_num_threads())
    return norms


@registry.kernel("group_norm_grad_samples", "cpu", refuses=_TAKES)
def group_norm_grad_samples(call: GroupNormGradients) -> tuple[Tensor, Tensor]:
    weight, bias = (native.empty(records(call), call.x.shape[1]) for _ in range(2))
    call = _in_one_layout(call)
    native.cpu.group_norm_grad_norms(privacy_structs.group_norm(call, None, weight, bias), torch.get_num_threads())
    return weight, bias


def _contiguous(call: LayerNormGradients) -> LayerNormGradients:
    """Both tensors of one dtype."""
    dtype = torch.promote_types(call.x.dtype, call.grad_output.dtype)
    x, grad_output = (each.to(dtype).contiguous() for each in call[:2])
    return call._replace(x=x, grad_output=grad_output)


@registry.kernel("layer_norm_grad_norms", "cpu", refuses=_TAKES)
def layer_norm_grad_norms(call: LayerNormGradients) -> Tensor:
    norms, call = native.empty(records(call)), _contiguous(call)
    native.cpu.layer_norm_grad_norms(privacy_structs.layer_norm(call, norms, None, None), torch.get_num_threads())
    return norms


@registry.kernel("layer_norm_grad_samples", "cpu", refuses=_TAKES)
def layer_norm_grad_samples(call: LayerNormGradients) -> tuple[Tensor, Tensor | None]:
    weight, bias = (native.empty(records(call), call.x.shape[2]) for _ in range(2))
    bias, call = bias if call.bias else None, _contiguous(call)
    native.cpu.layer_norm_grad_norms(privacy_structs.layer_norm(call, None, weight, bias), torch.get_num_threads())
    return weight, bias


@registry.kernel("embedding_grad_norms", "cpu", refuses=_TAKES)
def embedding_grad_norms(call: EmbeddingGradients) -> Tensor:
    norms = native.empty(records(call))
    call = call._replace(indices=call.indices.contiguous(), grad_output=call.grad_output.contiguous())
    native.cpu.embedding_grad_norms(privacy_structs.embedding(call, norms), torch.get_num_threads())
    return norms
