"""Group norm and SiLU in one pass, with the additions and the concatenation that stand before it in a UNet."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import GroupNorm
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define

_OP = "group_norm_silu"


def _empty(call: GroupNorm) -> Tensor:
    batch, channels, height, width = call.x.shape
    channels += 0 if call.skip is None else call.skip.shape[1]
    shape, x = (batch, channels, height, width), call.x
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@define(
    "group_norm_silu(Tensor x, Tensor? skip, Tensor? shift, Tensor? weight, Tensor? bias, int groups, float eps, "
    "bool silu) -> Tensor",
    fake=lambda *arguments: _empty(GroupNorm(*arguments)),
)
def _impl(*arguments):
    norm = GroupNorm(*arguments)
    y = _empty(norm)
    if y.numel():
        registry.resolve(_OP, Call(y.device.type, y.dtype))(norm, y)
    return y


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
    the pixels and channels of a group, in float32, the variance about the mean. For inference: there is no backward.

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
    Raises: TypeError or ValueError naming the argument; ValueError if an input requires grad while grad mode is on.
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
    if torch.is_grad_enabled():
        _check.no_grad(_OP, x=x, skip=skip, weight=weight, bias=bias, shift=shift)
    arguments = (x, skip, shift, weight, bias, groups, float(eps), activation == "silu")
    return call(torch.ops.kr_fast.group_norm_silu.default, *arguments)
