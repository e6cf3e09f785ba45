"""A convolution and its two gradients apart, by this package's kernels where these are faster."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.backends.cpu.nn import winograd_is_faster, winograd_trains_faster
from kr_fast.ops.nn import winograd_conv2d_grad_weight as winograd_grad_weight
from kr_fast.ops.nn.winograd_conv2d import winograd_conv2d
from kr_fast.training.conditions import plain
from kr_fast.training.layout import nhwc


class Form(NamedTuple):
    """The options of a ``Conv2d``, and whether Winograd's algorithm can compute it."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    winograd: bool

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Form":
        """Raises: ValueError for a padding that differs between two sides."""
        padding = conv.padding
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            if padding == "same" and any(each % 2 for each in total):
                raise ValueError("padding='same' of an even kernel")
            padding = tuple(each // 2 for each in total) if padding == "same" else (0, 0)
        return cls(conv.stride, padding, conv.dilation, conv.groups, winograd_is_faster(conv, conv.stride, padding))

    def options(self) -> dict[str, Any]:
        """Of the ops of family ``privacy``."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


def _by_winograd(form: Form, x: Tensor, weight: Tensor) -> bool:
    fits = form.winograd and plain(x) and weight.dtype == torch.float32
    return fits and winograd_trains_faster(x.shape, len(weight))


def forward(form: Form, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution; ``x`` in any layout."""
    if _by_winograd(form, x, weight):
        with torch.no_grad():
            return winograd_conv2d(nhwc(x), weight, bias=bias)
    return F.conv2d(x, weight, bias, form.stride, form.padding, form.dilation, form.groups)


def grad_input(form: Form, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient by ``x``."""
    if _by_winograd(form, x, weight):
        return torch.ops.kr_fast.winograd_conv2d_grad_input(nhwc(grad), weight)
    return _backward(form, grad, x, weight, [True, False, False])[0]


def grad_weight(form: Form, grad: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients by the weight and, if asked for, the bias."""
    if _by_winograd(form, x, weight):
        found, of_bias = winograd_grad_weight.run(nhwc(x), nhwc(grad), bias, not weight.is_contiguous())
        return found, of_bias if bias else None
    found, of_bias = _backward(form, grad, x, weight, [False, True, bias])[1:]
    return found, of_bias if bias else None


def _backward(form: Form, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    """torch's, of one dtype."""
    sizes = None if not wanted[2] else [len(weight)]
    tensors = grad, x.to(grad.dtype), weight.to(grad.dtype)
    options = form.stride, form.padding, form.dilation, False, [0, 0], form.groups
    return torch.ops.aten.convolution_backward(*tensors, sizes, *options, wanted)
