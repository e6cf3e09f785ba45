"""Triton kernel of the gradient of group_norm_silu: one program takes whole groups of channels of one sample.

With ``n = (u - mean) rstd`` and ``dz = g act'(weight n + bias)``: ``du = rstd (weight dz - mean_g(weight dz) -
n mean_g(weight dz n))``. Tiles are those of the forward pass, smaller: two tensors are read. Where the whole
sample fits a tile it is read once. Terms of the gradients of weight and bias are left by sample and added in order.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.batched.model_conv2d import INTERPRETED
from kr_fast.kernels.nn.group_norm_silu import _load
from kr_fast.kernels.nn.group_norm_silu import tile as forward_tile
from kr_fast.kernels.rounding import store

MOST = 2048  # elements of a tile of each of the two


@triton.jit
def _slopes(
    grad, x, skip, sample, pixel, channel, live, pixels, x_channels, skip_channels, add, centre, rstd, scale, offset,
    HAS_SKIP: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """n and dz of a tile; 0 where not live."""
    channels = x_channels + skip_channels
    u = _load(x, skip, sample, pixel, channel, live, pixels, x_channels, skip_channels, HAS_SKIP)
    n = tl.where(live, (u + (add - centre)[None, :]) * rstd[None, :], 0.0)
    at = sample * pixels * channels + pixel[:, None].to(tl.int64) * channels + channel[None, :]
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
    if SILU:
        z = n * scale[None, :] + offset[None, :]
        s = 1.0 / (1.0 + tl.exp(-z))
        g = tl.where(live, g * s * (1.0 + z * (1.0 - s)), 0.0)
    return n, g


@triton.jit
def _mean_of_group(value, exists, count, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    total = tl.sum(tl.reshape(tl.where(exists, value, 0.0), (GROUPS, SPAN)), axis=1) / count
    return tl.reshape(tl.broadcast_to(total[:, None], (GROUPS, SPAN)), (GROUPS * SPAN,))


@triton.jit
def _write(out, skip_out, du, sample, pixel, channel, live, pixels, x_channels, skip_channels, ROUND: tl.constexpr):
    own = live & (channel < x_channels)[None, :]
    at = sample * pixels * x_channels + pixel[:, None].to(tl.int64) * x_channels + channel[None, :]
    store(out, at, du, own, ROUND)
    if skip_out is not None:
        other = live & (channel >= x_channels)[None, :]
        at = sample * pixels * skip_channels + pixel[:, None].to(tl.int64) * skip_channels
        store(skip_out, at + (channel - x_channels)[None, :], du, other, ROUND)


@triton.jit
def gradient_kernel(
    grad, x, skip, shift, weight, bias, means, rstds, out, skip_out, grad_shift, partial, pixels, x_channels,
    skip_channels, shift_stride,
    SIZE: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr, P: tl.constexpr,
    WHOLE: tl.constexpr, SILU: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    HAS_SKIP: tl.constexpr = skip is not None
    sample = tl.program_id(0).to(tl.int64)
    channels = x_channels + skip_channels
    lane = tl.arange(0, GROUPS * SPAN)
    group = tl.program_id(1) * GROUPS + lane // SPAN
    if SIZE == SPAN:  # said apart, so that the compiler sees adjacent channels
        channel = tl.program_id(1) * GROUPS * SIZE + lane
        exists = channel < channels
    else:
        channel = group * SIZE + lane % SPAN
        exists = (group < ALL) & (lane % SPAN < SIZE)
    row = tl.arange(0, P)
    centre = tl.load(means + sample * ALL + group, mask=exists, other=0.0)
    rstd = tl.load(rstds + sample * ALL + group, mask=exists, other=0.0)
    scale, offset = tl.full([GROUPS * SPAN], 1.0, tl.float32), tl.zeros([GROUPS * SPAN], tl.float32)
    add = tl.zeros([GROUPS * SPAN], tl.float32)
    if weight is not None:
        scale = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    if shift is not None:
        add = tl.load(shift + sample * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)

    live = (row < pixels)[:, None] & exists[None, :]
    n, dz = _slopes(
        grad, x, skip, sample, row, channel, live, pixels, x_channels, skip_channels, add, centre, rstd, scale, offset,
        HAS_SKIP, SILU,
    )  # fmt: skip
    one, two = tl.sum(dz, axis=0), tl.sum(dz * n, axis=0)
    if not WHOLE:
        for start in tl.range(P, pixels, P):
            live = (start + row < pixels)[:, None] & exists[None, :]
            n, dz = _slopes(
                grad, x, skip, sample, start + row, channel, live, pixels, x_channels, skip_channels, add, centre, rstd,
                scale, offset, HAS_SKIP, SILU,
            )  # fmt: skip
            one += tl.sum(dz, axis=0)
            two += tl.sum(dz * n, axis=0)
    terms = partial + sample * 2 * channels + channel
    tl.store(terms, two, mask=exists)
    tl.store(terms + channels, one, mask=exists)

    count = tl.cast(pixels, tl.float32) * SIZE
    level = _mean_of_group(scale * one, exists, count, GROUPS, SPAN)
    slope = _mean_of_group(scale * two, exists, count, GROUPS, SPAN)
    if WHOLE:
        du = rstd[None, :] * (scale[None, :] * dz - level[None, :] - n * slope[None, :])
        _write(out, skip_out, du, sample, row, channel, live, pixels, x_channels, skip_channels, ROUND)
        total = tl.sum(tl.where(live, du, 0.0), axis=0)
    else:
        total = tl.zeros([GROUPS * SPAN], tl.float32)
        for start in tl.range(0, pixels, P):
            pixel = start + row
            live = (pixel < pixels)[:, None] & exists[None, :]
            n, dz = _slopes(
                grad, x, skip, sample, pixel, channel, live, pixels, x_channels, skip_channels, add, centre, rstd,
                scale, offset, HAS_SKIP, SILU,
            )  # fmt: skip
            du = rstd[None, :] * (scale[None, :] * dz - level[None, :] - n * slope[None, :])
            _write(out, skip_out, du, sample, pixel, channel, live, pixels, x_channels, skip_channels, ROUND)
            total += tl.sum(tl.where(live, du, 0.0), axis=0)
    if grad_shift is not None:
        tl.store(grad_shift + sample * channels + channel, total, mask=exists)


def tile(pixels: int, size: int, groups: int, element_size: int) -> tuple[int, int, int, bool, int]:
    """As that of the forward pass, with 8 numbers of each tensor a thread, for more would spill."""
    span, together, rows, whole, _ = forward_tile(pixels, size, groups, element_size, MOST)
    return span, together, rows, whole, 8 if rows * span * together >= MOST else 4


def backward(call) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, skip, shift, weight and bias, None for what is not there."""
    x, skip, shift = call.x, call.skip, call.shift
    batch, channels, height, width = call.grad.shape
    pixels, size = height * width, channels // call.groups
    span, together, rows, whole, warps = tile(pixels, size, call.groups, x.element_size())
    out, skip_out = torch.empty_like(x), None if skip is None else torch.empty_like(skip)
    grad_shift = None if shift is None else x.new_empty(batch, channels, dtype=torch.float32)
    partial = x.new_empty(batch, 2, channels, dtype=torch.float32)
    tensors = (x, skip, shift, call.weight, call.bias, call.mean, call.rstd, out, skip_out, grad_shift, partial)
    sizes = (pixels, x.shape[1], channels - x.shape[1], 0 if shift is None else shift.stride(0))
    constants = {"SIZE": size, "SPAN": span, "GROUPS": together, "ALL": call.groups, "P": rows, "WHOLE": whole}
    constants |= {"ROUND": INTERPRETED and x.dtype == torch.bfloat16, "num_warps": warps, "enable_fp_fusion": True}
    grid = (batch, triton.cdiv(call.groups, together))
    gradient_kernel[grid](call.grad, *tensors, *sizes, **constants, SILU=call.silu)
    grad_weight, grad_bias = partial.sum(0)
    return out, skip_out, grad_shift, grad_weight, grad_bias
