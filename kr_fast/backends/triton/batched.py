"""Kernels of the family ``batched`` in ``kr_fast.kernels``."""

import functools

import torch

from kr_fast.backends import native, registry
from kr_fast.backends.arguments import BatchNorm, BatchNormGradient, Sgd
from kr_fast.backends.calls import ConvCall

_CONV_DTYPES = native.triton_tensors(torch.float32, torch.bfloat16, torch.float16)


def _refuses_conv(call: ConvCall) -> str | None:
    return "groups must be 1 or the input's channels" if call.kind == "grouped" else _CONV_DTYPES(call)


@registry.kernel("model_conv2d", "triton", refuses=_refuses_conv)
def model_conv2d(x, weight, *rest):
    from kr_fast.kernels.batched import model_conv2d as kernels

    with native.on(x):
        return kernels.model_conv2d(x, weight, *rest)


def _refuses_conv_backward(call: ConvCall) -> str | None:
    return _CONV_DTYPES(call) if call.kind == "dense" else "groups must be 1"


@registry.kernel("model_conv2d_backward", "triton", refuses=_refuses_conv_backward)
def model_conv2d_backward(grad, *rest):
    from kr_fast.kernels.batched import model_conv2d_backward as kernels

    with native.on(grad):
        return kernels.model_conv2d_backward(grad, *rest)


def _batch_norm_forward(call: BatchNorm):
    from kr_fast.kernels.batched import model_batch_norm as kernels

    with native.on(call.x):
        return kernels.forward(call)


def _batch_norm_backward(call: BatchNormGradient):
    from kr_fast.kernels.batched import model_batch_norm as kernels

    with native.on(call.x):
        return kernels.backward(call)


registry.differentiable(
    "model_batch_norm",
    "triton",
    registry.Differentiable(_batch_norm_forward, _batch_norm_backward),
    refuses=_CONV_DTYPES,
)


@registry.kernel("model_sgd", "triton", refuses=native.triton_tensors(torch.float32))
def model_sgd(call: Sgd) -> None:
    from kr_fast.kernels.batched import model_sgd as kernels

    with native.on(call.weight):
        kernels.model_sgd(call, *_sgd_layout(len(call.rate), call.sizes, call.decays, call.weight.device))


@functools.lru_cache(maxsize=16)
def _sgd_layout(models: int, sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device):
    """Kept, so that no step copies a table to the device."""
    from kr_fast.kernels.batched import model_sgd as kernels

    return kernels.layout(models, sizes, decays, device)
