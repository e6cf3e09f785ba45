"""A 3x3 convolution by Winograd's minimal filtering, with all that follows it in its epilogue."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import WinogradConv
from kr_fast.backends.calls import Call
from kr_fast.backends.codes import ACTIVATIONS
from kr_fast.ops import _check
from kr_fast.ops._library import any_requires_grad, call, define, is_plain, no_backward, save, saved
from kr_fast.ops.nn import winograd_conv2d_grad_weight as grad_weight_op
from kr_fast.ops.nn.reference import packed_shape
from kr_fast.ops.nn.winograd_pack import unchecked as pack

_OP = "winograd_conv2d"
_DTYPES = (torch.float32, torch.float64)


def _shape(x: Tensor, outputs: int, pool: bool) -> tuple[int, int, int, int]:
    batch, _, height, width = x.shape
    return (batch, outputs, height // 2, width // 2) if pool else (batch, outputs, height, width)


def _empty(x: Tensor, outputs: int, pool: bool) -> Tensor:
    shape = _shape(x, outputs, pool)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _run(conv: WinogradConv) -> Tensor:
    y = _empty(conv.x, conv.outputs, conv.pool)
    if y.numel():
        registry.resolve(_OP, Call(y.device.type, y.dtype))(conv, y)
    return y


def _fake(x, weight, outputs, scale, bias, residual, activation, pool):
    return _empty(x, len(weight) if outputs is None else outputs, pool)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.outputs, *_ = inputs
    if ctx.outputs is None:
        save(ctx, x, weight)


def _backward(ctx, grad_output):
    if ctx.outputs is not None:
        raise no_backward(_OP)
    by_x, by_weight, _, _, by_bias, *_ = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = _gradients(ctx, grad_output, (by_x, by_weight, by_bias), direct=False)
    return grad_x, grad_weight, None, None, grad_bias, None, None, None


def _gradients(ctx, grad_output, needed: tuple[bool, bool, bool], *, direct: bool) -> tuple[Tensor | None, ...]:
    """By x, weight and bias; ``direct`` goes past the dispatcher."""
    if torch._C._functorch.is_legacy_batchedtensor(grad_output):
        raise RuntimeError(f"{_OP}: upstream gradients must not be batched (is_grads_batched, vectorize)")
    x, weight = saved(ctx)
    by_x, by_weight, by_bias = needed
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grad_input_of, grad_weight_of = torch.ops.kr_fast.winograd_conv2d_grad_input.default, grad_weight_op.unchecked
    if direct:
        grad_input_of, grad_weight_of = _grad_input, grad_weight_op.run
    grad_x = grad_input_of(grad_output, weight) if by_x else None
    if by_weight:
        grad_weight, grad_bias = grad_weight_of(x, grad_output, by_bias, not weight.is_contiguous())
    else:
        grad_weight, grad_bias = None, grad_output.sum((0, 2, 3)) if by_bias else None
    return grad_x, grad_weight, grad_bias if by_bias else None


@define(
    "winograd_conv2d(Tensor x, Tensor weight, int? outputs, Tensor? scale, Tensor? bias, Tensor? residual, "
    "str? activation, bool pool) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
def _impl(x, weight, outputs, *options):
    if outputs is None:
        outputs, weight = weight.shape[0], pack(weight, None, False, x.dtype)
    return _run(WinogradConv(x, weight, outputs, *options))


@define(
    "winograd_conv2d_grad_input(Tensor grad_output, Tensor weight) -> Tensor",
    fake=lambda grad_output, weight: _empty(grad_output, weight.shape[1], False),
)
def _grad_input(grad_output, weight):
    turned = pack(weight, None, True, weight.dtype)
    return _run(WinogradConv(grad_output, turned, weight.shape[1], None, None, None, None, False))


class _Train(torch.autograd.Function):
    """The same for plain tensors: the dispatcher's autograd costs 40 us a step and convolution more than this."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        save(ctx, x, weight)
        return _impl(x, weight, None, None, bias, None, None, False)

    @staticmethod
    def backward(ctx, grad_output):
        # With create_graph the dispatcher's ops are recorded, which refuse to be differentiated.
        return _gradients(ctx, grad_output, ctx.needs_input_grad, direct=not torch.is_grad_enabled())


# Past Function.apply, which unwraps what torch.func has wrapped: such tensors go to the dispatcher.
_train = super(torch.autograd.Function, _Train).apply

unchecked = torch.ops.kr_fast.winograd_conv2d.default  # for callers whose arguments are right by construction


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    outputs: int | None = None,
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
    bits whatever images stand beside it, and for any number of threads.

    In training ``weight`` is that of ``nn.Conv2d`` and ``outputs`` is left out: the filters are transformed in the
    call, and there is a gradient by ``x``, ``weight`` and ``bias``, once (a second derivative is refused). By ``x`` it
    is such a convolution itself, by ``weight`` see ``winograd_conv2d_grad_weight``. For inference pack the weight
    once; all that follows the convolution is then done with it, and there is no backward.

    Args:
        x: ``[N, I, H, W]``, channels_last, float32 (float64 on the reference backend).
        weight: ``[O, I, 3, 3]`` in any layout; with ``outputs`` that of :func:`kr_fast.winograd_pack`. Of ``x``'s
            dtype.
        outputs: O, channels of the result of a packed weight.
        scale, bias: ``[O]`` of ``x``'s dtype; None for 1 and 0. A BatchNorm behind the pooling goes here.
        residual: of the result's shape and ``x``'s dtype, channels_last, added before the activation.
        activation: None, "relu", "gelu" (the exact one) or "silu".
        pool: take the largest of 2x2 pixels, without overlap; a last odd row or column is dropped.
            Without ``outputs`` there is no scale, residual, activation or pooling.
    Returns: ``[N, O, H, W]`` or ``[N, O, H // 2, W // 2]`` of ``x``'s dtype, channels_last.
    Raises: TypeError or ValueError naming the argument; with ``outputs``, ValueError if an input requires grad while
        grad mode is on.
    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, eq. 8 and section 4.2; the
        choice of points: Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", 2020.
    """
    _check.channels_last(_OP, "x", x, dtypes=_DTYPES)
    if outputs is None:
        _check_filters(x, weight, bias)
        for name, value in (("scale", scale), ("residual", residual), ("activation", activation), ("pool", pool)):
            if value is not None and value is not False:
                _check.fail(_OP, name, "be left out where outputs is (weight is not packed)", value)
        tensors = (x, weight) if bias is None else (x, weight, bias)
        transformed = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        if not transformed and is_plain(*tensors) and torch.is_grad_enabled() and any_requires_grad(*tensors):
            return _train(x, weight, bias)
    else:
        outputs = _check_packed(x, weight, outputs, scale, bias, residual, activation, pool)
    return call(unchecked, x, weight, outputs, scale, bias, residual, activation, pool)


def _check_filters(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtypes = (x.dtype,)
    _check.tensor(_OP, "weight", weight, ndim=4, dtypes=dtypes)
    shape = (len(weight), x.shape[1], 3, 3)
    if weight.shape != shape or weight.device != x.device or 0 in shape:
        _check.fail(_OP, "weight", f"be [O, {x.shape[1]}, 3, 3] on {x.device} without outputs", weight)
    if bias is not None:
        _check.operand(_OP, "bias", bias, (len(weight),), like=x, dtypes=dtypes)


def _check_packed(x, weight, outputs, scale, bias, residual, activation, pool) -> int:
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
    return outputs
