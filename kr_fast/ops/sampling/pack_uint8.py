"""Network output to image bytes."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define


def _fake(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=torch.uint8)


@define("pack_uint8(Tensor x) -> Tensor", fake=_fake)
def _impl(x: Tensor) -> Tensor:
    return registry.resolve("pack_uint8", Call(x.device.type, x.dtype))(x)


def pack_uint8(x: Tensor) -> Tensor:
    """``round(127.5 * clamp(x, -1, 1) + 127.5)`` as bytes, halves to even, in image layout.

    Args:
        x: ``[N, C, H, W]`` float32, bfloat16, float16 or float64 in [-1, 1] (values outside are clamped); NCHW or
            channels_last in memory.
    Returns: uint8 ``[N, H, W, C]``, contiguous.
    Raises: TypeError or ValueError naming the argument. NaN becomes 0.
    """
    _check.tensor("pack_uint8", "x", x, ndim=4)
    if not x.dtype.is_floating_point:
        _check.fail("pack_uint8", "x", "be a floating point tensor", x, TypeError)
    return call(torch.ops.kr_fast.pack_uint8.default, x)
