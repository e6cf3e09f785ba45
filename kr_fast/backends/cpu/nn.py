"""Kernels of the family ``nn`` in ``kr_fast._cpu``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.calls import AttentionCall
from kr_fast.backends.native import address


@registry.kernel("group_norm_silu", "cpu", refuses=native.cpu_tensors(*codes.DTYPES))
def group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu) -> Tensor:
    batch, channels, height, width = x.shape
    more = 0 if skip is None else skip.shape[1]
    shape = (batch, channels + more, height, width)
    y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    if y.numel():
        affine = weight if bias is None else bias
        native.cpu.group_norm_silu(
            x.data_ptr(), address(skip), batch, height * width, channels, more, codes.DTYPES[x.dtype],
            address(weight), address(bias), 0 if affine is None else codes.DTYPES[affine.dtype],
            address(shift), 0 if shift is None else codes.DTYPES[shift.dtype], 0 if shift is None else shift.stride(0),
            groups, eps, silu, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return y


def _refuses_attention(call: AttentionCall) -> str | None:
    if call.head_channels not in (8, 16, 32, 64, None):
        return f"heads must have 8, 16, 32 or 64 channels, got {call.head_channels}"
    return native.cpu_tensors(*codes.DTYPES)(call)


WINOGRAD_TILES = getattr(native.cpu, "winograd_tiles", 1)  # that the kernel takes together


def winograd_pack(weight: Tensor, scale: Tensor | None, transform: Tensor, packed: Tensor) -> bool:
    """Fill ``packed`` with the transformed filters ``scale * weight``; False where it is left to the reference."""
    if not hasattr(native.cpu, "winograd_pack") or weight.device.type != "cpu":
        return False
    native.cpu.winograd_pack(
        weight.data_ptr(), *weight.shape[:2], address(scale), transform.data_ptr(), packed.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return True


@registry.kernel("winograd_conv2d", "cpu", refuses=native.cpu_tensors(torch.float32))
def winograd_conv2d(x, weight, scale, bias, residual, activation, pool, y) -> None:
    batch, inputs, height, width = x.shape
    native.cpu.winograd_conv2d(
        x.data_ptr(), batch, height, width, inputs, weight.data_ptr(), address(scale), address(bias),
        address(residual), codes.ACTIVATIONS.index(activation), pool, y.data_ptr(), y.shape[1], torch.get_num_threads(),
    )  # fmt: skip


@registry.kernel("qkv_attention", "cpu", refuses=_refuses_attention)
def qkv_attention(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    out = torch.empty(batch, tokens, width // 3, dtype=qkv.dtype)
    native.cpu.qkv_attention(
        qkv.data_ptr(), codes.DTYPES[qkv.dtype], batch, tokens, heads, width // 3 // heads, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
