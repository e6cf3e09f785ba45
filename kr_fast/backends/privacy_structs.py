"""Calls of the family ``privacy`` as the structs of ``csrc`` that a compiled module takes, as :mod:`.structs` does."""

from torch import Tensor

from kr_fast.backends.codes import DTYPES
from kr_fast.backends.native import address
from kr_fast.backends.privacy_arguments import (
    ConvGradients,
    EmbeddingGradients,
    GroupNormGradients,
    LayerNormGradients,
    LinearGradients,
    records,
)
from kr_fast.backends.structs import Struct


def conv(call: ConvGradients, norms: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Struct:
    """``kr::ConvGradients`` that writes into the last three; both tensors of ``call`` float32 and channels_last."""
    (inputs, height, width), (outputs, output_height, output_width) = call.x.shape[1:], call.grad_output.shape[1:]
    return {
        "x": call.x.data_ptr(),
        "grad_output": call.grad_output.data_ptr(),
        "records": records(call),
        "images": call.multiplicity,
        "height": height,
        "width": width,
        "inputs": inputs,
        "output_height": output_height,
        "output_width": output_width,
        "outputs": outputs,
        "kernel_height": call.kernel_size[0],
        "kernel_width": call.kernel_size[1],
        "stride_y": call.stride[0],
        "stride_x": call.stride[1],
        "pad_y": call.padding[0],
        "pad_x": call.padding[1],
        "dilation_y": call.dilation[0],
        "dilation_x": call.dilation[1],
        "groups": call.groups,
        "norms": address(norms),
        "weight": address(weight),
        "bias": address(bias),
        "with_bias": call.bias,
    }


def linear(call: LinearGradients, norms: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Struct:
    """``kr::LinearGradients`` that writes into the last three; both tensors of ``call`` float32 and contiguous."""
    positions, inputs = call.x.shape[1:]
    return {
        "x": call.x.data_ptr(),
        "grad_output": call.grad_output.data_ptr(),
        "records": records(call),
        "positions": call.multiplicity * positions,
        "inputs": inputs,
        "outputs": call.grad_output.shape[2],
        "norms": address(norms),
        "weight": address(weight),
        "bias": address(bias),
        "with_bias": call.bias,
    }


def group_norm(call: GroupNormGradients, norms: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Struct:
    """``kr::GroupNormGradNorms`` that writes into the last three; both tensors of ``call`` in one layout."""
    return {
        "x": call.x.data_ptr(),
        "grad": call.grad_output.data_ptr(),
        "records": records(call),
        "rows": call.multiplicity,
        "channels": call.x.shape[1],
        "pixels": call.x.shape[2:].numel(),
        "groups": call.groups,
        "dtype": DTYPES[call.x.dtype],
        "channels_last": not call.x.is_contiguous(),
        "eps": call.eps,
        "norms": address(norms),
        "weight": address(weight),
        "bias": address(bias),
    }


def layer_norm(call: LayerNormGradients, norms: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Struct:
    """``kr::LayerNormGradNorms`` that writes into the last three."""
    positions, size = call.x.shape[1:]
    return {
        "x": call.x.data_ptr(),
        "grad": call.grad_output.data_ptr(),
        "records": records(call),
        "rows": call.multiplicity * positions,
        "size": size,
        "dtype": DTYPES[call.x.dtype],
        "eps": call.eps,
        "with_bias": call.bias,
        "norms": address(norms),
        "weight": address(weight),
        "bias": address(bias),
    }


def embedding(call: EmbeddingGradients, norms: Tensor) -> Struct:
    """``kr::EmbeddingGradNorms`` that writes into ``norms``."""
    positions, size = call.grad_output.shape[1:]
    return {
        "indices": call.indices.data_ptr(),
        "grad": call.grad_output.data_ptr(),
        "records": records(call),
        "rows": call.multiplicity * positions,
        "size": size,
        "dtype": DTYPES[call.grad_output.dtype],
        "padding": -1 if call.padding_idx is None else call.padding_idx,
        "norms": norms.data_ptr(),
    }
