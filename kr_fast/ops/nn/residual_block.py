"""A residual block of two 3x3 convolutions in training, in one call forward and one backward."""

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import BlockLayers, BlockState
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define, is_direct, save, saved, wants_dispatcher
from kr_fast.ops.nn.reference import transforms, update_running

_OP = "residual_block"
_LAST = torch.channels_last
CHANNELS = 16  # of which those of a block are multiples


class ResidualLayer(NamedTuple):
    """A convolution of a residual block and the BatchNorm behind it.

    ``weight`` is ``[O, I, 3, 3]``, or ``[O, I, 1, 1]`` on the shortcut; the others as in
    :func:`kr_fast.batch_norm_act`.
    """

    weight: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5


def _kernels(x: Tensor) -> registry.Differentiable:
    return registry.resolve(_OP, Call(x.device.type, x.dtype))


def dense(weight: Tensor) -> Tensor:
    """``weight`` in a layout that kernels read."""
    return weight if weight.is_contiguous() or weight.is_contiguous(memory_format=_LAST) else weight.contiguous()


def _empty(x: Tensor, weights: Sequence[Tensor], norms, stride: int, eps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the state that forward writes."""
    y, layers = _empty_result(x, weights, stride), len(weights)
    batch, outputs, rows, columns = y.shape
    return (
        y,
        x.new_empty(layers, batch, rows, columns, outputs),
        x.new_empty(layers, 2, outputs),
        x.new_empty((batch, rows, columns, outputs // 8), dtype=torch.uint8),
    )


def _empty_result(x: Tensor, weights: Sequence[Tensor], stride: int) -> Tensor:
    batch, _, height, width = x.shape
    shape = (batch, weights[0].shape[0], (height - 1) // stride + 1, (width - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAST)


def _run(x: Tensor, layers: BlockLayers) -> tuple[Tensor, BlockState]:
    y, *state = _empty(x, *layers[:4])
    state = BlockState(*state)
    _kernels(x).forward(x, layers, transforms()[1], y, state)
    return y, state


def _gradients(grad: Tensor, x: Tensor, layers: BlockLayers, state: BlockState, needs_x: bool):
    """By x, the weights and the norms, of which the last is ``[layers, 2, O]``."""
    return _kernels(x).backward(grad, x, layers, transforms()[1], state, needs_x)


@define(
    "residual_block_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] norms, int stride, float[] eps, "
    "Tensor convolved, Tensor statistics, Tensor positive) -> (Tensor, Tensor[], Tensor)",
    fake=lambda grad, x, weights, norms, stride, eps, convolved, statistics, positive: (
        torch.empty_like(x, memory_format=_LAST),
        [torch.empty_like(each) for each in weights],
        torch.empty_like(statistics),
    ),
)
def _backward_impl(grad, x, weights, norms, stride, eps, *state):
    return _gradients(grad, x, BlockLayers(weights, norms, stride, eps), BlockState(*state), True)


def _keep(ctx, x: Tensor, layers: BlockLayers, state: BlockState) -> None:
    ctx.count, ctx.stride, ctx.eps = len(layers.weights), layers.stride, layers.eps
    save(ctx, x, *layers.weights, *layers.norms, *state)


def _backward(ctx, grad: Tensor, *, needs_x: bool = True) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    x, *kept = saved(ctx)
    count = ctx.count
    layers, state = BlockLayers(kept[:count], kept[count:-3], ctx.stride, ctx.eps), BlockState(*kept[-3:])
    grad = grad.contiguous(memory_format=_LAST)
    if wants_dispatcher(grad):
        found = torch.ops.kr_fast.residual_block_backward(grad, x, *_for_dispatcher(layers), *state)
    else:
        found = _gradients(grad, x, layers, state, needs_x)
    grad_x, grad_weights, grad_norm = found
    return grad_x, grad_weights, grad_norm.flatten(0, 1).unbind()


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    x, *layers = inputs
    _keep(ctx, x, BlockLayers(*layers), BlockState(*output[1:]))


def _backward_of_lists(ctx, grad, *_):
    grad_x, grad_weights, grad_norms = _backward(ctx, grad)
    return grad_x, list(grad_weights), list(grad_norms), None, None


@define(
    "residual_block(Tensor x, Tensor[] weights, Tensor[] norms, int stride, float[] eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty,
    backward=_backward_of_lists,
    setup_context=_setup_context,
)
def _forward(x, weights, norms, stride, eps):
    y, state = _run(x, BlockLayers(weights, norms, stride, eps))
    return y, *state


def _for_dispatcher(layers: BlockLayers) -> tuple:
    """The op's arguments behind x: norms that were left out are there."""
    defaults = [layers.weights[0].new_full((len(layers.weights[0]),), value) for value in (1.0, 0.0)]
    norms = [defaults[index % 2] if each is None else each for index, each in enumerate(layers.norms)]
    return layers.weights, norms, layers.stride, layers.eps


class _Plain(torch.autograd.Function):
    """The op past the dispatcher, which costs as much as a small layer."""

    @staticmethod
    def forward(ctx, x, layers, *tensors):
        y, state = _run(x, layers)
        ctx.set_materialize_grads(False)
        _keep(ctx, x, layers, state)
        return y

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        grad_x, grad_weights, grad_norms = _backward(ctx, grad, needs_x=needs[0])
        gradients = grad_x, None, *grad_weights, *grad_norms
        return tuple(each if needed else None for each, needed in zip(gradients, needs, strict=True))


def unchecked(x: Tensor, layers: BlockLayers) -> Tensor:
    """For arguments that are right by construction."""
    tensors = (*layers.weights, *layers.norms)
    if is_direct(x, *tensors):
        return _Plain.apply(x, layers, *tensors)
    y, _, statistics, _ = call(torch.ops.kr_fast.residual_block.default, x, *_for_dispatcher(layers))
    for index, momentum in enumerate(layers.momentum):
        if layers.running[2 * index] is not None:
            update_running(*layers.running[2 * index : 2 * index + 2], *statistics[index], momentum, y)
    return y


def inference(x: Tensor, layers: BlockLayers) -> Tensor:
    """By the running statistics, for arguments that are right by construction; there is no derivative."""
    return call(torch.ops.kr_fast.residual_block_inference.default, x, *_for_dispatcher(layers), list(layers.running))


@define(
    "residual_block_inference(Tensor x, Tensor[] weights, Tensor[] norms, int stride, float[] eps, Tensor[] running) "
    "-> Tensor",
    fake=lambda x, weights, norms, stride, eps, running: _empty_result(x, weights, stride),
)
def _inference(x, weights, norms, stride, eps, running):
    y = _empty_result(x, weights, stride)
    _kernels(x).forward(x, BlockLayers(weights, norms, stride, eps, running), transforms()[1], y, None)
    return y


def residual_block(
    x: Tensor,
    first: ResidualLayer,
    second: ResidualLayer,
    shortcut: ResidualLayer | None = None,
    *,
    stride: int = 1,
    training: bool = True,
) -> Tensor:
    """A residual block: ``relu(norm2(conv2(t)) + s)`` with ``t = relu(norm1(conv1(x)))``.

    ``s`` is ``x`` or ``norm3(conv3(x))``. ``conv1`` (3x3, padding 1) and ``conv3`` (1x1) have ``stride``, ``conv2``
    (3x3, padding 1) has stride 1; none has a bias. ``norm(u) = weight (u - mean) / sqrt(var + eps) + bias`` by the
    statistics of the batch, as in :func:`kr_fast.batch_norm_act`. Differentiable in ``x`` and all weights and biases,
    once (a second derivative is refused). Running statistics are updated in place, outside autograd. Without
    ``training`` they are taken instead of those of the batch and stay as they are, and there is no derivative.

    On a CPU a group of images stays in the second cache from one dependency on the whole batch to the next: 3 passes
    over the activations forward and 3 backward. 3x3 convolutions of stride 1 are taken by Winograd's algorithm where
    that is faster (see :func:`kr_fast.winograd_conv2d` for its error), the others by the definition. The bits do not
    depend on the number of threads.

    Args:
        x: ``[N, I, H, W]``, channels_last, float32 (float64 on the reference backend).
        first, second, shortcut: :class:`kr_fast.ResidualLayer` of weights ``[O, I, 3, 3]``, ``[O, O, 3, 3]`` and
            ``[O, I, 1, 1]``; tensors of ``x``'s dtype. Without a shortcut I is O and the stride 1.
        stride: 1 or 2. I and O are multiples of 16.
        training: whether the statistics are those of the batch.
    Returns: ``[N, O, ceil(H / stride), ceil(W / stride)]``, channels_last.
    Raises: TypeError or ValueError naming the argument; ValueError if a channel has fewer than 2 numbers in training.
    Source: He et al., "Deep Residual Learning", CVPR 2016, eq. 1 and 2; Ioffe and Szegedy, "Batch Normalization", ICML
        2015, algorithm 1; Lavin and Gray, CVPR 2016.
    """
    _check.channels_last(_OP, "x", x, dtypes=(torch.float32, torch.float64))
    if stride not in (1, 2):
        _check.fail(_OP, "stride", "be 1 or 2", stride)
    _check.tensor(_OP, "first.weight", first.weight, ndim=4, dtypes=(x.dtype,))
    batch, inputs, height, width = x.shape
    outputs = len(first.weight)
    if inputs % CHANNELS or not inputs:
        _check.fail(_OP, "x", f"have a multiple of {CHANNELS} channels", x)
    if outputs % CHANNELS or not outputs:
        _check.fail(_OP, "first.weight", f"have a multiple of {CHANNELS} outputs", first.weight)
    if not isinstance(training, bool):
        _check.fail(_OP, "training", "be a bool", training, TypeError)
    if batch * -(-height // stride) * -(-width // stride) < 1 + training:
        _check.fail(_OP, "x", f"leave at least {1 + training} numbers of each channel", x)
    if shortcut is None and (stride != 1 or inputs != outputs):
        _check.fail(_OP, "shortcut", "be a layer where the shape changes", None)
    _check_layer("first", first, x, (outputs, inputs, 3, 3))
    _check_layer("second", second, x, (outputs, outputs, 3, 3))
    if shortcut is not None:
        _check_layer("shortcut", shortcut, x, (outputs, inputs, 1, 1))
    layers = block_layers([each for each in (first, second, shortcut) if each is not None], stride)
    if training:
        return unchecked(x, layers)
    for name, layer in zip(("first", "second", "shortcut"), (first, second, shortcut), strict=True):
        if layer is not None and layer.running_mean is None:
            _check.fail(_OP, f"{name}.running_mean", "be given without training", None)
    tensors = (*layers.weights, *layers.norms)
    _check.no_grad(_OP, x=x, **{f"layers[{i}]": each for i, each in enumerate(tensors)})
    return inference(x, layers)


def block_layers(layers: Sequence[ResidualLayer], stride: int) -> BlockLayers:
    """Of layers that are right by construction."""
    weights = [dense(each.weight) for each in layers]
    norms = [each for layer in layers for each in (layer.norm_weight, layer.norm_bias)]
    running = [each for layer in layers for each in (layer.running_mean, layer.running_var)]
    return BlockLayers(
        weights, norms, stride, [float(each.eps) for each in layers], running, [float(each.momentum) for each in layers]
    )


def _check_layer(argument: str, layer: ResidualLayer, x: Tensor, shape: tuple[int, ...]) -> None:
    _check.operand(_OP, f"{argument}.weight", layer.weight, shape, like=x, dtypes=(x.dtype,), contiguous=False)
    for name in ("norm_weight", "norm_bias", "running_mean", "running_var"):
        value = getattr(layer, name)
        if value is not None:
            _check.operand(_OP, f"{argument}.{name}", value, shape[:1], like=x, dtypes=(x.dtype,))
            if name.startswith("running") and value.requires_grad:
                _check.fail(_OP, f"{argument}.{name}", "not require grad", value)
    if (layer.running_mean is None) != (layer.running_var is None):
        missing = "running_mean" if layer.running_mean is None else "running_var"
        _check.fail(_OP, f"{argument}.{missing}", "be given where the other running statistic is", None)
    if not isinstance(layer.momentum, numbers.Real) or not 0 <= layer.momentum <= 1:
        _check.fail(_OP, f"{argument}.momentum", "be a number in [0, 1]", layer.momentum)
    if not layer.eps >= 0:
        _check.fail(_OP, f"{argument}.eps", "be at least 0", layer.eps)
