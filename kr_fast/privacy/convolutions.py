"""A convolution and its two gradients apart, by this package's kernels where these are faster."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.backends.cpu.nn import direct_trains_faster, winograd_is_faster, winograd_trains_faster
from kr_fast.ops.nn import winograd_conv2d_grad_weight as winograd_grad_weight
from kr_fast.ops.nn import winograd_pack
from kr_fast.ops.nn.direct_conv2d import direct_conv2d
from kr_fast.ops.nn.winograd_conv2d import winograd_conv2d
from kr_fast.training.conditions import plain
from kr_fast.training.layout import nhwc

Gradients = tuple[Tensor, Tensor | None]


class Form(NamedTuple):
    """A ``Conv2d`` padded with zeros, with its padding as numbers."""

    conv: nn.Conv2d
    padding: tuple[int, int]
    fits_winograd: bool

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Form":
        """Raises: ValueError for a padding that differs between two sides."""
        padding = conv.padding
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            if padding == "same" and any(each % 2 for each in total):
                raise ValueError("padding='same' of an even kernel")
            padding = tuple(each // 2 for each in total) if padding == "same" else (0, 0)
        return cls(conv, padding, winograd_is_faster(conv, conv.stride, padding))

    def options(self) -> dict[str, Any]:
        """Of the ops of family ``privacy``."""
        conv = self.conv
        return {"stride": conv.stride, "padding": self.padding, "dilation": conv.dilation, "groups": conv.groups}


def _algorithm(form: Form, x: Tensor, grad: Tensor | None = None) -> str:
    conv = form.conv
    if not plain(x) or (grad is not None and grad.dtype != x.dtype):  # of a forward under autocast
        return "torch"
    if form.fits_winograd and winograd_trains_faster(x.shape, conv.out_channels):
        return "winograd"
    return "direct" if direct_trains_faster(conv, x.shape) else "torch"


def laid_out(form: Form, x: Tensor) -> Tensor:
    """``x`` as the convolution reads it."""
    return x if _algorithm(form, x) == "torch" else nhwc(x)


def forward(form: Form, x: Tensor) -> Tensor:
    """The convolution; no gradient is recorded."""
    conv, algorithm = form.conv, _algorithm(form, x)
    with torch.no_grad():
        if algorithm == "winograd":
            return winograd_conv2d(nhwc(x), conv.weight, bias=conv.bias)
        if algorithm == "direct":
            return direct_conv2d(nhwc(x), conv.weight, bias=conv.bias, stride=conv.stride, padding=form.padding)
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, form.padding, conv.dilation, conv.groups)


def grad_input(form: Form, grad: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The gradient by ``x``, and ``residual`` added to it."""
    weight = form.conv.weight
    if _algorithm(form, x, grad) == "winograd":
        if residual is None:
            return torch.ops.kr_fast.winograd_conv2d_grad_input(nhwc(grad), weight)
        turned = winograd_pack.unchecked(weight, None, True, weight.dtype)
        options = None, None, residual, None, False
        return torch.ops.kr_fast.winograd_conv2d(nhwc(grad), turned, weight.shape[1], *options)
    by_x = _backward(form, grad, x, (True, False, False))[0]
    return by_x if residual is None else by_x.add_(residual)


def grad_weight(form: Form, grad: Tensor, x: Tensor, bias: bool) -> Gradients:
    """The gradients by the weight and, if asked for, the bias."""
    if _algorithm(form, x, grad) == "winograd":
        channels_last = not form.conv.weight.is_contiguous()
        weight, of_bias = winograd_grad_weight.run(nhwc(x), nhwc(grad), bias, channels_last)
    else:
        weight, of_bias = _backward(form, grad, x, (False, True, bias))[1:]
    return weight, of_bias if bias else None


def _backward(form: Form, grad: Tensor, x: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    conv = form.conv
    if _algorithm(form, x, grad) == "direct":
        tensors = nhwc(grad), nhwc(x), conv.weight
        return torch.ops.kr_fast.direct_conv2d_backward(*tensors, conv.stride, form.padding, *wanted)
    sizes = [conv.out_channels] if wanted[2] else None
    tensors = grad, x.to(grad.dtype), conv.weight.to(grad.dtype)  # of one dtype under autocast
    options = conv.stride, form.padding, conv.dilation, False, [0, 0], conv.groups
    return torch.ops.aten.convolution_backward(*tensors, sizes, *options, wanted)
