"""Kernels of ``kr_fast.kernels`` (Triton). Triton is imported by the first call and not by ``import kr_fast``."""

import contextlib
import functools
import importlib.util
import os

import torch

from kr_fast.backends import registry

if importlib.util.find_spec("triton") is None:
    registry.mark_unavailable("triton", "triton is not installed; pip install triton")


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def accepts(*dtypes: torch.dtype):
    """A predicate: tensors of one of ``dtypes`` on a GPU, or anywhere under TRITON_INTERPRET=1."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(device: str, dtype: torch.dtype, size: int) -> str | None:
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"tensors must be on cuda (or TRITON_INTERPRET=1 set), got {device}"
        if dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}"
        return None

    return refuses


def _distillation_forward(input, target, indices, labels, weight, *parameters):
    from kr_fast.kernels import distillation_loss as kernels

    with _on(input):
        return kernels.forward(input, target, indices, labels, weight, *parameters)


def _distillation_backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters):
    from kr_fast.kernels import distillation_loss as kernels

    with _on(input):
        return kernels.backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters[:-1])


registry.two_way(
    "distillation_loss",
    "triton",
    _distillation_forward,
    _distillation_backward,
    refuses=accepts(torch.float32, torch.bfloat16, torch.float16),
)


@registry.kernel("distillation_metrics", "triton", refuses=accepts(torch.float32, torch.bfloat16, torch.float16))
def distillation_metrics(input, target, labels, temperature):
    from kr_fast.kernels import distillation_metrics as kernels

    if target.dtype == torch.float64:
        target = target.float()
    with _on(input):
        return kernels.metrics(input, target, labels, temperature)


@registry.kernel("membership_signals", "triton", refuses=accepts(torch.float32, torch.bfloat16, torch.float16))
def membership_signals(logits, labels, want):
    from kr_fast.kernels import membership_signals as kernels

    with _on(logits):
        return kernels.signals(logits if logits.stride(1) == 1 else logits.contiguous(), labels, want)


@registry.kernel("philox_normal", "triton", refuses=accepts(torch.float32))
def philox_normal(ids, numel, *, seed, stream):
    from kr_fast.kernels import philox_normal as kernels

    with _on(ids):
        return kernels.philox_normal(ids, numel, seed, stream)


@registry.kernel("pack_uint8", "triton", refuses=accepts(torch.float32, torch.bfloat16, torch.float16))
def pack_uint8(x):
    from kr_fast.kernels import pack_uint8 as kernels

    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    with _on(x):
        return kernels.pack_uint8(x if last else x.contiguous(), last)


@registry.kernel("group_norm_silu", "triton", refuses=accepts(torch.float32, torch.bfloat16, torch.float16))
def group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu):
    from kr_fast.kernels import group_norm_silu as kernels

    with _on(x):
        return kernels.group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu)


@registry.kernel("solver_step", "triton", refuses=accepts(torch.float32))
def solver_step(
    sample, model_output, uncond_output, ids, limits, history, row, guidance, seed, stream, copies, out
) -> None:
    from kr_fast.kernels import solver_step as kernels

    outputs = kernels.one_layout(model_output, uncond_output)
    with _on(sample):
        kernels.solver_step(sample, *outputs, ids, limits, history, row, guidance, seed, stream, copies, out)


_CONV_DTYPES = accepts(torch.float32, torch.bfloat16, torch.float16)


def _refuses_conv(device: str, dtype: torch.dtype, size: int) -> str | None:
    return "groups must be 1 or the input's channels" if size == 2 else _CONV_DTYPES(device, dtype, size)


@registry.kernel("model_conv2d", "triton", refuses=_refuses_conv)
def model_conv2d(x, weight, *rest):
    from kr_fast.kernels import model_conv2d as kernels

    with _on(x):
        return kernels.model_conv2d(x, weight, *rest)


def _refuses_conv_backward(device: str, dtype: torch.dtype, size: int) -> str | None:
    return "groups must be 1" if size else _CONV_DTYPES(device, dtype, size)


@registry.kernel("model_conv2d_backward", "triton", refuses=_refuses_conv_backward)
def model_conv2d_backward(grad, *rest):
    from kr_fast.kernels import model_conv2d_backward as kernels

    with _on(grad):
        return kernels.model_conv2d_backward(grad, *rest)


def _batch_norm_forward(x, *rest):
    from kr_fast.kernels import model_batch_norm as kernels

    with _on(x):
        return kernels.forward(x, *rest)


def _batch_norm_backward(grad, *rest):
    from kr_fast.kernels import model_batch_norm as kernels

    with _on(grad):
        return kernels.backward(grad, *rest)


registry.two_way("model_batch_norm", "triton", _batch_norm_forward, _batch_norm_backward, refuses=_CONV_DTYPES)


@registry.kernel("model_sgd", "triton", refuses=accepts(torch.float32))
def model_sgd(weight, velocity, grad, rate, momentum, sizes, decays):
    from kr_fast.kernels import model_sgd as kernels

    with _on(weight):
        layout = _sgd_layout(len(rate), sizes, decays, weight.device)
        kernels.model_sgd(weight, velocity, grad, rate, momentum, *layout)


@functools.lru_cache(maxsize=16)
def _sgd_layout(models: int, sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device):
    """Kept, so that no step copies a table to the device."""
    from kr_fast.kernels import model_sgd as kernels

    return kernels.layout(models, sizes, decays, device)
