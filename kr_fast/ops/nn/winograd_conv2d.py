"""A 3x3 convolution by Winograd's minimal filtering, with all that follows it in its epilogue."""

import torch
from torch import Tensor, nn

from kr_fast.backends import native, registry
from kr_fast.backends.calls import Call
from kr_fast.backends.codes import ACTIVATIONS
from kr_fast.backends.cpu import nn as kernels
from kr_fast.ops import _check
from kr_fast.ops._library import call, define
from kr_fast.ops.nn import reference
from kr_fast.ops.nn.reference import packed_shape

_OP = "winograd_conv2d"
_DTYPES = (torch.float32, torch.float64)
# With fewer inputs the transforms of pixels cost more than the products that they save.
FEWEST_INPUTS = 12
# Of the 16 pixels of a tile. Sums by the definition, 9 a pixel, cost as much as the 36 of a tile with all that is
# around them where 7 pixels are real: 2x2 and 5x5 pixels took the same time, 3x3 and 6x6 (9 a tile) 1.1 to 1.9 times
# as long by the library, 4x4, 7x7 and 8x8 twice (64 to 512 channels, AVX-512).
FEWEST_PIXELS = 8


def gains(
    conv: nn.Conv2d, stride: tuple[int, ...], padding: tuple[int, ...] | str, size: tuple[int, int] = (4, 4)
) -> bool:
    """Whether float32 on this CPU is faster for ``conv`` than the library's kernels, on images of ``size``.

    Plain C++ would lose to them, and so do images that leave most of their tiles empty.
    """
    form = (conv.kernel_size, stride, padding, conv.padding_mode, conv.dilation, conv.groups)
    fits = form == ((3, 3), (1, 1), (1, 1), "zeros", (1, 1), 1) and conv.in_channels >= FEWEST_INPUTS
    tiles = -(-size[0] // 4) * -(-size[1] // 4)
    return fits and size[0] * size[1] >= FEWEST_PIXELS * tiles and native.isa() not in (None, "scalar")


def batch_size(count: int, images: int) -> int:
    """Near ``count``, so that ``images`` images in batches of it, the last filled up, take the least time.

    A number whose tiles fill the kernel's blocks whatever the image's size, for a last block of a few tiles reads all
    weights as a full one does; unless the last batch would waste more than the 4 % that it saves. Half a block is
    enough for images of an even number of tiles.
    """
    block = kernels.WINOGRAD_TILES
    whole = block * round(count / block) or (block // 2 if 3 * count > block else count)

    def filled(size: int) -> int:
        return -(-images // size) * size

    return whole if filled(whole) <= 1.04 * filled(count) else count


@torch.no_grad()
def winograd_pack(weight: Tensor, scale: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of :func:`winograd_conv2d`, transformed in float64: ``U = G (scale g) G^T`` for each output and input.

    Args:
        weight: ``[O, I, 3, 3]`` of any floating dtype.
        scale: float64 ``[O]``, of a BatchNorm behind the convolution; None for 1.
        dtype: of the result, float32 or float64.
    Returns: ``[36, ceil(O / block), ceil(I / 16) * 16, block]``, block 16 for up to 16 outputs and 32 beyond; zeros
        where there is no output or input.
    Raises: TypeError or ValueError naming the argument.
    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, eq. 8-12.
    """
    _check.tensor("winograd_pack", "weight", weight, ndim=4)
    if not weight.is_floating_point() or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        _check.fail("winograd_pack", "weight", "be floating point [O, I, 3, 3]", weight)
    if dtype not in _DTYPES:
        _check.fail("winograd_pack", "dtype", "be float32 or float64", dtype, TypeError)
    if scale is not None:
        _check.tensor("winograd_pack", "scale", scale, ndim=1, dtypes=(torch.float64,))
        if len(scale) != len(weight) or scale.device != weight.device:
            _check.fail("winograd_pack", "scale", f"be [{len(weight)}] on {weight.device}", scale)
    if weight.dtype != torch.float64 and dtype == torch.float32:
        packed = torch.empty(packed_shape(*weight.shape[:2]), device=weight.device)
        scale = None if scale is None else scale.contiguous()
        if kernels.winograd_pack(weight.float().contiguous(), scale, reference.transforms()[1], packed):
            return packed
    return reference.pack(weight, dtype, scale)


def _shape(x: Tensor, outputs: int, pool: bool) -> tuple[int, int, int, int]:
    height, width = (size // 2 if pool else size for size in x.shape[2:])
    return len(x), outputs, height, width


def _fake(x, weight, outputs, scale, bias, residual, activation, pool):
    return torch.empty(_shape(x, outputs, pool), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@define(
    "winograd_conv2d(Tensor x, Tensor weight, int outputs, Tensor? scale, Tensor? bias, Tensor? residual, "
    "str? activation, bool pool) -> Tensor",
    fake=_fake,
)
def _impl(x, weight, outputs, scale, bias, residual, activation, pool):
    run = registry.resolve(_OP, Call(x.device.type, x.dtype))
    y = _fake(x, weight, outputs, scale, bias, residual, activation, pool)
    if y.numel():
        run(x, weight, scale, bias, residual, activation, pool, y)
    return y


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    pool: bool = False,
) -> Tensor:
    """``act(scale * pool(conv(x)) + bias + residual)`` for a 3x3 convolution of stride 1 and padding 1.

    ``conv(x)[n, o, i, j] = sum_{c, k, l} w[o, c, k, l] x[n, c, i + k - 1, j + l - 1]`` with zeros outside, taken as
    F(4x4, 3x3): a quarter of the multiplications. The root mean square error is about five times that of float32 sums
    by the definition. NaN and inf reach all 4x4 pixels of a tile that reads them. The answer for an image has the same
    bits whatever images stand beside it, and for any number of threads. For inference: there is no backward.

    Args:
        x: ``[N, I, H, W]``, channels_last, float32 (float64 on the reference backend).
        weight: of :func:`winograd_pack`, of ``x``'s dtype.
        outputs: O, channels of the result.
        scale, bias: ``[O]`` of ``x``'s dtype; None for 1 and 0. A BatchNorm behind the pooling goes here.
        residual: of the result's shape and ``x``'s dtype, channels_last, added before the activation.
        activation: None, "relu", "gelu" (the exact one) or "silu".
        pool: take the largest of 2x2 pixels, without overlap; a last odd row or column is dropped.
    Returns: ``[N, O, H, W]`` or ``[N, O, H // 2, W // 2]`` of ``x``'s dtype, channels_last.
    Raises: TypeError or ValueError naming the argument; ValueError if an input requires grad while grad mode is on.
    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, eq. 8 and section 4.2; the
        choice of points: Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", 2020.
    """
    _check.tensor(_OP, "x", x, ndim=4, dtypes=_DTYPES)
    _check.channels_last(_OP, "x", x)
    outputs = _check.integer(_OP, "outputs", outputs, 1, 2**31)
    shape = packed_shape(outputs, x.shape[1])
    _check.tensor(_OP, "weight", weight, ndim=4, dtypes=(x.dtype,))
    if weight.shape != shape or weight.device != x.device or not weight.is_contiguous():
        rule = f"be contiguous {list(shape)} on {x.device} for {x.shape[1]} inputs and {outputs} outputs"
        _check.fail(_OP, "weight", rule, weight)
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            _check.tensor(_OP, name, value, ndim=1, dtypes=(x.dtype,))
            if len(value) != outputs or value.device != x.device or not value.is_contiguous():
                _check.fail(_OP, name, f"be contiguous [{outputs}] on {x.device}", value)
    if not isinstance(pool, bool):
        _check.fail(_OP, "pool", "be a bool", pool, TypeError)
    if residual is not None:
        _check.tensor(_OP, "residual", residual, ndim=4, dtypes=(x.dtype,))
        wanted = _shape(x, outputs, pool)
        if residual.shape != wanted or residual.device != x.device:
            _check.fail(_OP, "residual", f"be {list(wanted)} on {x.device}", residual)
        _check.channels_last(_OP, "residual", residual)
    if activation not in ACTIVATIONS:
        _check.fail(_OP, "activation", "be None, 'relu', 'gelu' or 'silu'", activation)
    _check.no_grad(_OP, x=x, weight=weight, scale=scale, bias=bias, residual=residual)
    return call(torch.ops.kr_fast.winograd_conv2d.default, x, weight, outputs, scale, bias, residual, activation, pool)
