"""A 3x3 convolution by Winograd's minimal filtering, with all that follows it in its epilogue."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import WinogradConv
from kr_fast.backends.calls import Call
from kr_fast.backends.codes import ACTIVATIONS
from kr_fast.ops import _check
from kr_fast.ops._library import call, define
from kr_fast.ops.nn.reference import packed_shape

_OP = "winograd_conv2d"


def _shape(x: Tensor, outputs: int, pool: bool) -> tuple[int, int, int, int]:
    height, width = (size // 2 if pool else size for size in x.shape[2:])
    return len(x), outputs, height, width


def _empty(conv: WinogradConv) -> Tensor:
    shape, x = _shape(conv.x, conv.outputs, conv.pool), conv.x
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@define(
    "winograd_conv2d(Tensor x, Tensor weight, int outputs, Tensor? scale, Tensor? bias, Tensor? residual, "
    "str? activation, bool pool) -> Tensor",
    fake=lambda *arguments: _empty(WinogradConv(*arguments)),
)
def _impl(*arguments):
    conv = WinogradConv(*arguments)
    y = _empty(conv)
    if y.numel():
        registry.resolve(_OP, Call(y.device.type, y.dtype))(conv, y)
    return y


unchecked = torch.ops.kr_fast.winograd_conv2d.default  # for callers whose arguments are right by construction


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
        weight: of :func:`kr_fast.winograd_pack`, of ``x``'s dtype.
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
    _check.channels_last(_OP, "x", x, dtypes=(torch.float32, torch.float64))
    outputs = _check.integer(_OP, "outputs", outputs, 1, 2**31)
    shape, dtypes = packed_shape(outputs, x.shape[1]), (x.dtype,)
    _check.tensor(_OP, "weight", weight, ndim=4, dtypes=dtypes)
    if weight.shape != shape or weight.device != x.device or not weight.is_contiguous():
        rule = f"be contiguous {list(shape)} on {x.device} for {x.shape[1]} inputs and {outputs} outputs"
        _check.fail(_OP, "weight", rule, weight)
    if scale is not None:
        _check.operand(_OP, "scale", scale, (outputs,), like=x, dtypes=dtypes)
    if bias is not None:
        _check.operand(_OP, "bias", bias, (outputs,), like=x, dtypes=dtypes)
    if not isinstance(pool, bool):
        _check.fail(_OP, "pool", "be a bool", pool, TypeError)
    if residual is not None:
        expected = _shape(x, outputs, pool)
        _check.operand(_OP, "residual", residual, expected, like=x, dtypes=dtypes, contiguous=False)
        _check.channels_last(_OP, "residual", residual, dtypes=dtypes)
    if activation not in ACTIVATIONS:
        _check.fail(_OP, "activation", "be None, 'relu', 'gelu' or 'silu'", activation)
    if torch.is_grad_enabled():
        _check.no_grad(_OP, x=x, weight=weight, scale=scale, bias=bias, residual=residual)
    return call(unchecked, x, weight, outputs, scale, bias, residual, activation, pool)
