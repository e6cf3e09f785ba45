"""A convolution by its definition: the small ones of training that Winograd's algorithm does not take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import DirectConv, DirectConvGradient
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define, is_direct, save, saved, wants_dispatcher

_OP = "direct_conv2d"
_LAST = torch.channels_last


def _kernels(x: Tensor) -> registry.Differentiable:
    return registry.resolve(_OP, Call(x.device.type, x.dtype))


def _empty(conv: DirectConv) -> Tensor:
    (batch, _, height, width), (outputs, _, *kernel), (down, across) = conv.x.shape, conv.weight.shape, conv.padding
    rows = (height + 2 * down - kernel[0]) // conv.stride[0] + 1
    columns = (width + 2 * across - kernel[1]) // conv.stride[1] + 1
    shape = (batch, outputs, rows, columns)
    return torch.empty(shape, dtype=conv.x.dtype, device=conv.x.device, memory_format=_LAST)


def _run(conv: DirectConv) -> Tensor:
    y = _empty(conv)
    if y.numel():
        _kernels(conv.x).forward(conv, y)
    return y


def _run_backward(conv: DirectConvGradient) -> tuple[Tensor | None, ...]:
    if conv.grad_output.numel():
        return _kernels(conv.x).backward(conv)
    zeros = torch.zeros_like(conv.x), torch.zeros_like(conv.weight), conv.weight.new_zeros(len(conv.weight))
    return tuple(each if needed else None for each, needed in zip(zeros, conv[5:], strict=True))


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.stride, ctx.padding = inputs
    save(ctx, x, weight)


def _backward(ctx, grad_output):
    x, weight = saved(ctx)
    needed = ctx.needs_input_grad[:3]
    grad_output = grad_output.contiguous(memory_format=_LAST)
    conv = DirectConvGradient(grad_output, x, weight, tuple(ctx.stride), tuple(ctx.padding), *needed)
    if wants_dispatcher(grad_output):
        gradients = torch.ops.kr_fast.direct_conv2d_backward(*conv)
        gradients = [each if needs else None for each, needs in zip(gradients, needed, strict=True)]
    else:
        gradients = _run_backward(conv)
    return *gradients, None, None


@define(
    "direct_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding) -> Tensor",
    fake=lambda *arguments: _empty(DirectConv(*arguments)),
    backward=_backward,
    setup_context=_setup_context,
)
def _impl(x, weight, bias, stride, padding):
    return _run(DirectConv(x, weight, bias, tuple(stride), tuple(padding)))


def _fake_backward(grad_output, x, weight, stride, padding, by_x, by_weight, by_bias):
    return (
        torch.empty_like(x, memory_format=_LAST) if by_x else x.new_empty(0),
        torch.empty_like(weight) if by_weight else x.new_empty(0),
        x.new_empty(len(weight) if by_bias else 0),
    )


@define(
    "direct_conv2d_backward(Tensor grad_output, Tensor x, Tensor weight, int[2] stride, int[2] padding, bool by_x, "
    "bool by_weight, bool by_bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def _impl_backward(grad_output, x, weight, stride, padding, *needed):
    conv = DirectConvGradient(grad_output, x, weight, tuple(stride), tuple(padding), *needed)
    return tuple(x.new_empty(0) if each is None else each for each in _run_backward(conv))


class _Plain(torch.autograd.Function):
    """The op past the dispatcher, which costs as much as a small layer."""

    @staticmethod
    def forward(ctx, *arguments):
        _setup_context(ctx, arguments, None)
        return _run(DirectConv(*arguments))

    backward = staticmethod(_backward)


def direct_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """A convolution by its definition, and its gradient by ``x``, ``weight`` and ``bias``.

    ``y[n, o, i, j] = b[o] + sum_{c, k, l} w[o, c, k, l] x[n, c, i s - p + k, j s - p + l]`` with zeros outside, sums in
    float32. For small training convolutions that :func:`kr_fast.winograd_conv2d` does not take: other kernels and
    strides, few channels, images of a few pixels, of which only the products inside the image are computed. The bits
    do not depend on the number of threads; for ``y`` and the gradient by ``x`` nor on the images beside an image. A
    second derivative is refused.

    Args:
        x: ``[N, I, H, W]``, channels_last, float32 (float64 on the reference backend).
        weight: ``[O, I, K, L]`` of ``x``'s dtype, in any layout; the gradient has the same.
        bias: ``[O]`` of ``x``'s dtype, or None.
        stride: at least 1; one number or a pair, vertical and horizontal.
        padding: pixels of zeros on each side, at least 0; one number or a pair.
    Returns: ``[N, O, (H + 2 p - K) // s + 1, (W + 2 p - L) // s + 1]`` of ``x``'s dtype, channels_last.
    Raises: TypeError or ValueError naming the argument.
    Source: the definition; the gradients as convolutions: Dumoulin and Visin, "A guide to convolution arithmetic for
        deep learning", 2016, section 4.
    """
    _check.channels_last(_OP, "x", x, dtypes=(torch.float32, torch.float64))
    dtypes, stride, padding = (x.dtype,), _check.pair(_OP, "stride", stride, 1), _check.pair(_OP, "padding", padding, 0)
    _check.tensor(_OP, "weight", weight, ndim=4, dtypes=dtypes)
    (_, inputs, height, width), (_, channels, down, across) = x.shape, weight.shape
    fits = inputs == channels and down <= height + 2 * padding[0] and across <= width + 2 * padding[1]
    if not fits or 0 in x.shape[1:] or 0 in weight.shape or weight.device != x.device:
        rule = f"be [O, {x.shape[1]}, K, L] on {x.device} with at least 1 and at most H + 2 padding taps"
        _check.fail(_OP, "weight", rule, weight)
    if bias is not None:
        _check.operand(_OP, "bias", bias, (len(weight),), like=x, dtypes=dtypes)
    arguments = (x, weight, bias, stride, padding)
    if is_direct(x, weight, bias):
        return _Plain.apply(*arguments)
    return call(torch.ops.kr_fast.direct_conv2d.default, *arguments)
