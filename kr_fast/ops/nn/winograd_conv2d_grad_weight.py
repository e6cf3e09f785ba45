"""The gradient of the filters of winograd_conv2d."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import WinogradGradWeight
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define

_OP = "winograd_conv2d_grad_weight"


def _empty(x: Tensor, grad_output: Tensor, bias: bool, channels_last: bool) -> tuple[Tensor, Tensor]:
    outputs, inputs = grad_output.shape[1], x.shape[1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = torch.empty((outputs, inputs, 3, 3), dtype=x.dtype, device=x.device, memory_format=layout)
    return weight, x.new_empty(outputs if bias else 0)


@define(
    "winograd_conv2d_grad_weight(Tensor x, Tensor grad_output, bool bias, bool channels_last) -> (Tensor, Tensor)",
    fake=_empty,
)
def run(x: Tensor, grad_output: Tensor, bias: bool, channels_last: bool) -> tuple[Tensor, Tensor]:
    """As ``unchecked``, past the dispatcher."""
    grad_weight, grad_bias = _empty(x, grad_output, bias, channels_last)
    if not x.numel():
        return grad_weight.zero_(), grad_bias.zero_()
    arguments = WinogradGradWeight(x, grad_output, grad_weight, grad_bias if bias else None)
    registry.resolve(_OP, Call(x.device.type, x.dtype))(arguments)
    return grad_weight, grad_bias


unchecked = torch.ops.kr_fast.winograd_conv2d_grad_weight.default  # for arguments that are right by construction


def winograd_conv2d_grad_weight(
    x: Tensor, grad_output: Tensor, *, bias: bool = False, channels_last: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The gradient of a 3x3 convolution of stride 1 and padding 1 by its filters, and by its bias.

    ``dw[o, c, k, l] = sum_{n, i, j} x[n, c, i + k - 1, j + l - 1] dy[n, o, i, j]``, taken as F(3x3, 4x4): a quarter of
    the multiplications; ``db[o] = sum_{n, i, j} dy[n, o, i, j]``. The same bits for any number of threads. NaN and inf
    in channel c of ``x`` or o of ``dy`` reach all nine taps of ``dw[:, c]`` or ``dw[o]``, and the others not at all.
    There is no derivative of this.

    Args:
        x: ``[N, I, H, W]``, channels_last, float32 (float64 on the reference backend).
        grad_output: dy, ``[N, O, H, W]``, channels_last, of ``x``'s dtype.
        bias: whether to return ``db`` as well.
        channels_last: lay the result out so.
    Returns: ``[O, I, 3, 3]`` of ``x``'s dtype, and with ``bias`` also ``[O]``.
    Raises: TypeError or ValueError naming the argument.
    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.2 (F(3x3, 4x4) by
        the transposed transforms).
    """
    dtypes = (torch.float32, torch.float64)
    _check.channels_last(_OP, "x", x, dtypes=dtypes)
    _check.channels_last(_OP, "grad_output", grad_output, dtypes=(x.dtype,))
    if grad_output.shape[0] != len(x) or grad_output.shape[2:] != x.shape[2:] or grad_output.device != x.device:
        rule = f"be [{len(x)}, O, {x.shape[2]}, {x.shape[3]}] on {x.device}"
        _check.fail(_OP, "grad_output", rule, grad_output)
    for name, value in (("bias", bias), ("channels_last", channels_last)):
        if not isinstance(value, bool):
            _check.fail(_OP, name, "be a bool", value, TypeError)
    _check.no_grad(_OP, x=x, grad_output=grad_output)
    grad_weight, grad_bias = call(unchecked, x, grad_output, bias, channels_last)
    return (grad_weight, grad_bias) if bias else grad_weight
