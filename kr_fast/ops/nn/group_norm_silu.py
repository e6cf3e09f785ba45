"""Group norm and SiLU in one pass, with the additions and the concatenation that stand before it in a UNet."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import GroupNorm, GroupNormGradient
from kr_fast.backends.calls import GroupNormCall
from kr_fast.ops import _check
from kr_fast.ops._library import call, define, is_direct, save, saved, wants_dispatcher

_OP = "group_norm_silu"
_TENSORS = "Tensor x, Tensor? skip, Tensor? shift, Tensor? weight, Tensor? bias"


def _kernels(x: Tensor, *, trains: bool, size: int = 0) -> registry.Differentiable:
    return registry.resolve(_OP, GroupNormCall(x.device.type, x.dtype, trains, size))


def _empty(norm: GroupNorm) -> Tensor:
    batch, channels, height, width = norm.x.shape
    channels += 0 if norm.skip is None else norm.skip.shape[1]
    shape, x = (batch, channels, height, width), norm.x
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward_empty(norm: GroupNorm) -> tuple[Tensor, Tensor, Tensor]:
    mean = norm.x.new_empty(norm.x.shape[0], norm.groups, dtype=_exact(norm.x))
    return _empty(norm), mean, torch.empty_like(mean)


def _run_forward(norm: GroupNorm) -> tuple[Tensor, Tensor, Tensor]:
    result = _forward_empty(norm)
    if result[0].numel():
        _kernels(norm.x, trains=True).forward(norm, *result)
    return result


# ---------------------------------------------------------------- gradients


def _backward_empty(norm: GroupNormGradient) -> tuple[Tensor, ...]:
    """Of x, skip, shift, weight and bias; an empty tensor for what is not there."""
    x, channels = norm.x, norm.grad.shape[1]
    none, exact = x.new_empty(0), {"dtype": _exact(x), "device": x.device}
    skip = none if norm.skip is None else torch.empty_like(norm.skip)
    shift = none if norm.shift is None else torch.empty(len(x), channels, **exact)
    return torch.empty_like(x), skip, shift, torch.empty(channels, **exact), torch.empty(channels, **exact)


def _run_backward(norm: GroupNormGradient) -> tuple[Tensor | None, ...]:
    if not norm.grad.numel():
        return tuple(each.zero_() for each in _backward_empty(norm))
    return _kernels(norm.x, trains=True).backward(norm)


def _gradients(ctx, grad: Tensor, inputs: list[Tensor | None], mean: Tensor, rstd: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, skip, shift, weight and bias, each in its dtype, where they are needed."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    groups, _, silu = ctx.options
    norm = GroupNormGradient(grad, *inputs, mean, rstd, groups, silu)
    op = torch.ops.kr_fast.group_norm_silu_backward
    result = op(*norm) if wants_dispatcher(grad) else _run_backward(norm)
    return tuple(
        None if value is None or not needed else each if each.dtype == value.dtype else each.to(value.dtype)
        for each, value, needed in zip(result, inputs, ctx.needs_input_grad, strict=False)
    )


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[5:]  # groups, eps, silu
    save(ctx, *inputs[:5])


def _recomputing_backward(ctx, grad):
    """Of the op that keeps nothing, in a graph that was recorded without a gradient."""
    inputs = saved(ctx)
    _, mean, rstd = torch.ops.kr_fast.group_norm_silu_forward(*inputs, *ctx.options)
    return (*_gradients(ctx, grad, inputs, mean, rstd), None, None, None)


def _forward_setup_context(ctx, inputs, output):
    ctx.options = inputs[5:]  # groups, eps, silu
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    save(ctx, *inputs[:5], *output[1:])


def _forward_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    *inputs, mean, rstd = saved(ctx)
    return (*_gradients(ctx, grad, inputs, mean, rstd), None, None, None)


class _Plain(torch.autograd.Function):
    """The op past the dispatcher, which costs as much as a small layer."""

    @staticmethod
    def forward(ctx, *arguments):
        result = _run_forward(GroupNorm(*arguments))
        _forward_setup_context(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx, *grads):
        return _forward_backward(ctx, *grads)


# ---------------------------------------------------------------- torch.library


@define(
    f"group_norm_silu({_TENSORS}, int groups, float eps, bool silu) -> Tensor",
    fake=lambda *arguments: _empty(GroupNorm(*arguments)),
    backward=_recomputing_backward,
    setup_context=_setup_context,
)
def _impl(*arguments):
    norm = GroupNorm(*arguments)
    y = _empty(norm)
    if y.numel():
        _kernels(y, trains=False, size=y.shape[1] // norm.groups).forward(norm, y, None, None)
    return y


@define(
    f"group_norm_silu_forward({_TENSORS}, int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    fake=lambda *arguments: _forward_empty(GroupNorm(*arguments)),
    backward=_forward_backward,
    setup_context=_forward_setup_context,
)
def _forward(*arguments):
    return _run_forward(GroupNorm(*arguments))


@define(
    f"group_norm_silu_backward(Tensor grad, {_TENSORS}, Tensor mean, Tensor rstd, int groups, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda *arguments: _backward_empty(GroupNormGradient(*arguments)),
)
def _backward(*arguments):
    norm = GroupNormGradient(*arguments)
    return tuple(norm.x.new_empty(0) if each is None else each for each in _run_backward(norm))


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """SiLU of the group norm of ``[x, skip] + shift``, in one read and one write.

    ``y = act(weight * (u - mean_g(u)) / sqrt(var_g(u) + eps) + bias)`` with ``u = cat([x, skip], 1) + shift`` and
    ``act(a) = a / (1 + exp(-a))``. Neither the sum nor the concatenation is stored. Mean and (biased) variance are over
    the pixels and channels of a group, in float32, the variance about the mean. Differentiable in all tensors, once (a
    second derivative is refused): where a gradient is asked for, mean and ``1 / sqrt(var + eps)`` of each group are
    kept, and backward reads its inputs from memory once. The bits do not depend on the number of threads.

    Args:
        x: ``[N, C1, H, W]``, channels_last; float32, bfloat16 or float16 (float64 on the reference backend).
        groups: number of groups; divides ``C = C1 + C2``. A group may lie across ``x`` and ``skip``.
        weight, bias: ``[C]`` float32 or of ``x``'s dtype, both of one dtype; None for 1 and 0.
        shift: ``[N, C]`` float32 or of ``x``'s dtype, added before the statistics (the time embedding); any stride
            between its rows. With ``skip`` it covers the channels of both.
        skip: ``[N, C2, H, W]``, channels_last, of ``x``'s dtype: the second part of ``u``'s channels.
        eps: at least 0.
        activation: "silu" or None for the group norm alone.
    Returns: ``[N, C, H, W]`` of ``x``'s dtype, channels_last.
    Raises: TypeError or ValueError naming the argument.
    Source: Wu and He, "Group Normalization", ECCV 2018, eq. 1-4, 7; Elfwing et al., "Sigmoid-Weighted Linear Units",
        2018, eq. 8; statistics by chunks: Chan, Golub and LeVeque, 1979, eq. 2.1.
    """
    _check.channels_last(_OP, "x", x, dtypes=_check.FLOATING)
    channels = x.shape[1]
    if skip is not None:
        _check.channels_last(_OP, "skip", skip, dtypes=(x.dtype,))
        if skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:] or skip.device != x.device:
            _check.fail(_OP, "skip", f"match x ({_check.describe(x)}) but for channels", skip)
        channels += skip.shape[1]
    groups = _check.integer(_OP, "groups", groups, 1, 2**31)
    if channels == 0 or channels % groups:
        _check.fail(_OP, "groups", f"divide the {channels} channels", groups)
    dtypes = (x.dtype, torch.float32)
    if weight is not None:
        _check.operand(_OP, "weight", weight, (channels,), like=x, dtypes=dtypes)
    if bias is not None:
        _check.operand(_OP, "bias", bias, (channels,), like=x, dtypes=dtypes)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        _check.fail(_OP, "bias", f"have weight's dtype {weight.dtype}", bias, TypeError)
    if shift is not None:
        _check.operand(_OP, "shift", shift, (x.shape[0], channels), like=x, dtypes=dtypes, contiguous=False)
        if shift.stride(1) != 1:
            shift = shift.contiguous()
    if not eps >= 0:
        _check.fail(_OP, "eps", "be at least 0", eps)
    if activation not in ("silu", None):
        _check.fail(_OP, "activation", "be 'silu' or None", activation)
    arguments = (x, skip, shift, weight, bias, groups, float(eps), activation == "silu")
    if not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in arguments[:5])):
        return call(torch.ops.kr_fast.group_norm_silu.default, *arguments)
    if is_direct(*arguments[:5]):
        return _Plain.apply(*arguments)[0]
    return torch.ops.kr_fast.group_norm_silu_forward(*arguments)[0]
