"""A residual block of a diffusion UNet in training, in one call forward and one backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import PreactivationBlock
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define, is_direct, save, saved, wants_dispatcher
from kr_fast.ops.nn.reference import transforms

_OP = "preactivation_block"
_LAST = torch.channels_last
_TENSORS = 13  # of the block's arguments
_SCHEMA = (
    "Tensor x, Tensor? skip, Tensor? shift, Tensor norm1_weight, Tensor norm1_bias, Tensor conv1_weight, "
    "Tensor? conv1_bias, Tensor norm2_weight, Tensor norm2_bias, Tensor conv2_weight, Tensor? conv2_bias, "
    "Tensor? shortcut_weight, Tensor? shortcut_bias, int[2] groups, float[2] eps"
)


def _kernels(x: Tensor) -> registry.Differentiable:
    return registry.resolve(_OP, Call(x.device.type, x.dtype))


def _empty(block: PreactivationBlock) -> tuple[Tensor, ...]:
    """y and what forward keeps: what the 3x3 convolutions read, the result of the first, and, in one tensor, mean and
    ``1 / deviation`` of each image's groups in norm 1, then in norm 2."""
    x, (batch, channels, height, width), outputs = block.x, block.x.shape, len(block.conv1_weight)
    channels += 0 if block.skip is None else block.skip.shape[1]

    def image(count: int) -> Tensor:
        return torch.empty((batch, count, height, width), dtype=x.dtype, device=x.device, memory_format=_LAST)

    y, first, second, convolved = image(outputs), image(channels), image(outputs), image(outputs)
    return y, first, second, convolved, x.new_empty(2 * batch * sum(block.groups))


def _run(block: PreactivationBlock) -> tuple[Tensor, ...]:
    y, *state = _empty(block)
    if y.numel():
        _kernels(y).forward(block, transforms()[1], y, state)
    return y, *state


def _gradients(block: PreactivationBlock, grad: Tensor, state: Sequence[Tensor]) -> list[Tensor | None]:
    """In the order of the block's tensors."""
    if grad.numel():
        return _kernels(grad).backward(block, transforms()[1], grad, state)
    return [None if each is None else torch.zeros_like(each) for each in block[:_TENSORS]]


def _keep(ctx, inputs, state):
    ctx.set_materialize_grads(False)
    ctx.options = inputs[_TENSORS:]
    save(ctx, *inputs[:_TENSORS], *state)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * (_TENSORS + 2)
    kept = saved(ctx)
    block, state = PreactivationBlock(*kept[:_TENSORS], *ctx.options), kept[_TENSORS:]
    grad = grad.contiguous(memory_format=_LAST)
    if wants_dispatcher(grad):
        found = torch.ops.kr_fast.preactivation_block_backward(grad, *block, *state)
        given = [each is not None for each in block[:_TENSORS]]
        found = [each if there else None for each, there in zip(found, given, strict=True)]
    else:
        found = _gradients(block, grad, state)
    needed = ctx.needs_input_grad
    return *(each if needs else None for each, needs in zip(found, needed, strict=False)), None, None


@define(
    f"preactivation_block({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda *arguments: _empty(PreactivationBlock(*arguments)),
    backward=_backward,
    setup_context=_setup_context,
)
def _impl(*arguments):
    return _run(PreactivationBlock(*arguments))


@define(
    f"preactivation_block_backward(Tensor grad, {_SCHEMA}, Tensor first, Tensor second, Tensor convolved, "
    "Tensor statistics) -> Tensor[]",
    fake=lambda grad, *arguments: [
        grad.new_empty(0) if each is None else torch.empty_like(each) for each in arguments[:_TENSORS]
    ],
)
def _impl_backward(grad, *arguments):
    block, state = PreactivationBlock(*arguments[: _TENSORS + 2]), arguments[_TENSORS + 2 :]
    return [grad.new_empty(0) if each is None else each for each in _gradients(block, grad, state)]


class _Plain(torch.autograd.Function):
    """The op past the dispatcher."""

    @staticmethod
    def forward(ctx, *arguments):
        y, *state = _run(PreactivationBlock(*arguments))
        _keep(ctx, arguments, state)
        return y

    backward = staticmethod(_backward)


def preactivation_block(
    x: Tensor,
    norms: Sequence[tuple[int, Tensor, Tensor, float]],
    convolutions: Sequence[tuple[Tensor, Tensor | None]],
    *,
    skip: Tensor | None = None,
    shift: Tensor | None = None,
    shortcut: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """``conv2(act(norm2(conv1(act(norm1(u))) + shift))) + shortcut(u)`` with ``u = [x, skip]`` and SiLU for ``act``.

    Norms are group norms, convolutions are 3x3 with padding 1 by :func:`kr_fast.winograd_conv2d`'s algorithm, the
    shortcut is a 1x1 convolution or nothing. Images go through the block in groups that stay in the cache. The bits do
    not depend on the number of threads. Once differentiable in all tensors; a second derivative is refused.

    Args:
        x, skip: ``[N, C1, H, W]`` and ``[N, C2, H, W]``, channels_last, float32 (float64 on the reference backend).
        norms: number of groups, weight, bias and eps of each of the two; of ``C = C1 + C2`` and O channels.
        convolutions: weight and bias of each of the two, ``[O, C, 3, 3]`` and ``[O, O, 3, 3]``, contiguous or
            channels_last; biases ``[O]`` or None.
        shift: ``[N, O]``, the time embedding, added behind the first convolution; any stride between its rows.
        shortcut: weight ``[O, C, 1, 1]`` and bias; None where ``u`` itself is added, with ``C = O``.
    Returns: ``[N, O, H, W]``, channels_last.
    Raises: TypeError or ValueError naming the argument.
    Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, figure 1b; Ho et al., "Denoising
        Diffusion Probabilistic Models", NeurIPS 2020, appendix B.
    """
    _check.channels_last(_OP, "x", x, dtypes=(torch.float32, torch.float64))
    dtypes, (batch, channels, *size) = (x.dtype,), x.shape
    if skip is not None:
        _check.channels_last(_OP, "skip", skip, dtypes=dtypes)
        if [skip.shape[0], *skip.shape[2:]] != [batch, *size] or skip.device != x.device:
            _check.fail(_OP, "skip", f"match x ({_check.describe(x)}) but for channels", skip)
        channels += skip.shape[1]
    outputs = len(convolutions[0][0])
    arguments, inputs = [], channels
    for (groups, weight, bias, _), (filters, to_bias), number in zip(norms, convolutions, (1, 2), strict=True):
        for name, each in ((f"norm{number} weight", weight), (f"norm{number} bias", bias)):
            _check.operand(_OP, name, each, (inputs,), like=x, dtypes=dtypes)
        if not inputs or groups < 1 or inputs % groups:
            _check.fail(_OP, f"norm{number} groups", f"divide the {inputs} channels", groups)
        _check_filters(f"conv{number}", filters, to_bias, (outputs, inputs, 3, 3), x)
        arguments += weight, bias, filters, to_bias
        inputs = outputs
    if shift is not None:
        _check.operand(_OP, "shift", shift, (batch, outputs), like=x, dtypes=dtypes, contiguous=False)
        shift = shift if shift.stride(1) == 1 else shift.contiguous()
    if shortcut is not None:
        _check_filters("shortcut", *shortcut, (outputs, channels, 1, 1), x)
    elif channels != outputs:
        _check.fail(_OP, "shortcut", f"be given for {channels} channels and {outputs} outputs", None)
    groups, eps = [norm[0] for norm in norms], [float(norm[3]) for norm in norms]
    return unchecked(x, skip, shift, *arguments, *(shortcut or (None, None)), groups, eps)


def unchecked(*arguments) -> Tensor:
    """For arguments that are right by construction, in the order of the schema."""
    if is_direct(*arguments[:_TENSORS]):
        return _Plain.apply(*arguments)
    return call(torch.ops.kr_fast.preactivation_block.default, *arguments)[0]


def _check_filters(name: str, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    _check.tensor(_OP, f"{name} weight", weight, ndim=4, dtypes=(x.dtype,))
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=_LAST)
    if weight.shape != shape or weight.device != x.device or not dense:
        _check.fail(_OP, f"{name} weight", f"be {list(shape)} on {x.device}, contiguous or channels_last", weight)
    if bias is not None:
        _check.operand(_OP, f"{name} bias", bias, shape[:1], like=x, dtypes=(x.dtype,))
