"""Calls of the family ``privacy`` as the structs of ``csrc`` that a compiled module takes, as :mod:`.structs` does."""

from torch import Tensor

from kr_fast.backends.codes import DTYPES
from kr_fast.backends.native import address
from kr_fast.backends.privacy_arguments import EmbeddingGradients, GroupNormGradients, LayerNormGradients
from kr_fast.backends.structs import Struct


def group_norm(call: GroupNormGradients, norms: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Struct:
    """``kr::GroupNormGradNorms`` that writes into the last three; both tensors of ``call`` in one layout."""
    rows, channels = call.x.shape[:2]
    return {
        "x": call.x.data_ptr(),
        "grad": call.grad_output.data_ptr(),
        "records": rows // call.multiplicity,
        "rows": call.multiplicity,
        "channels": channels,
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
    rows, positions, size = call.x.shape
    return {
        "x": call.x.data_ptr(),
        "grad": call.grad_output.data_ptr(),
        "records": rows // call.multiplicity,
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
    rows, positions, size = call.grad_output.shape
    return {
        "indices": call.indices.data_ptr(),
        "grad": call.grad_output.data_ptr(),
        "records": rows // call.multiplicity,
        "rows": call.multiplicity * positions,
        "size": size,
        "dtype": DTYPES[call.grad_output.dtype],
        "padding": -1 if call.padding_idx is None else call.padding_idx,
        "norms": norms.data_ptr(),
    }
