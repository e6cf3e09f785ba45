"""Triton kernel of group_norm_grad_norms and group_norm_grad_samples: whole groups of channels of one record.

Of each row of the record, with ``n = (x - mean_g) rstd_g``: ``dw_c = sum(dy n)`` and ``db_c = sum(dy)``. Statistics
and sums are taken in one sweep: tiles of pixels are joined by Chan's rule, which carries ``sum(dy (x - mean_c))`` from
one mean to the next as it does the squares, so that both tensors are read once whatever their size. Pixels and channels
lie at any two steps. float32 after the load; offsets of rows are 64-bit.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.nn.group_norm_silu import tile as forward_tile
from kr_fast.kernels.privacy.conv2d_grad_norms import norm_of, over_tiles, steps

MOST = 2048  # elements of a tile of each of the two


@triton.jit
def _of_group(value, exists, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """The sum over the channels of a group, at each of them."""
    total = tl.sum(tl.reshape(tl.where(exists, value, 0.0), (GROUPS, SPAN)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (GROUPS, SPAN)), (GROUPS * SPAN,))


@triton.jit
def channel_sums(
    x, grad, norms, weight_samples, bias_samples, rows, pixels, x_row, x_pixel, x_channel, grad_row, grad_pixel,
    grad_channel, eps,
    SIZE: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Norm of weight and bias together of GROUPS groups of SIZE channels, each in SPAN lanes; P pixels at a time."""
    record = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, GROUPS * SPAN)
    group = tl.program_id(1) * GROUPS + lane // SPAN
    if SIZE == SPAN:  # said apart, so that the compiler sees adjacent channels
        channel = tl.program_id(1) * GROUPS * SIZE + lane
    else:
        channel = group * SIZE + lane % SPAN
    exists = (group < ALL) & (lane % SPAN < SIZE)
    weight = tl.zeros([GROUPS * SPAN], tl.float32)
    bias = tl.zeros([GROUPS * SPAN], tl.float32)
    for row in tl.range(0, rows):
        seen = x + (record * rows + row) * x_row + channel * x_channel
        signal = grad + (record * rows + row) * grad_row + channel * grad_channel
        mean = tl.zeros([GROUPS * SPAN], tl.float32)
        squares = tl.zeros([GROUPS * SPAN], tl.float32)
        plain = tl.zeros([GROUPS * SPAN], tl.float32)
        centred = tl.zeros([GROUPS * SPAN], tl.float32)
        for start in tl.range(0, pixels, P):
            pixel = start + tl.arange(0, P)
            live = (pixel < pixels)[:, None] & exists[None, :]
            u = tl.load(seen[None, :] + (pixel * x_pixel)[:, None], mask=live, other=0.0).to(tl.float32)
            g = tl.load(signal[None, :] + (pixel * grad_pixel)[:, None], mask=live, other=0.0).to(tl.float32)
            count = tl.minimum(pixels - start, P).to(tl.float32)
            share = count / (start + count)
            own = tl.sum(u, axis=0) / count
            d = tl.where(live, u - own[None, :], 0.0)
            one = tl.sum(g, axis=0)
            step = own - mean
            squares += tl.sum(d * d, axis=0) + step * step * (start * share)
            centred += tl.sum(g * d, axis=0) + step * (one * (1.0 - share) - plain * share)
            plain += one
            mean += step * share
        count = tl.cast(pixels, tl.float32)
        centre = _of_group(mean, exists, GROUPS, SPAN) / SIZE
        apart = mean - centre
        variance = _of_group(squares + count * apart * apart, exists, GROUPS, SPAN) / (count * SIZE)
        weight += (centred + apart * plain) / tl.sqrt(variance + eps)
        bias += plain

    weight, bias = tl.where(exists, weight, 0.0), tl.where(exists, bias, 0.0)
    if weight_samples is None:
        of_both = tl.join(weight, bias)
        norm = norm_of(of_both, tl.max(tl.abs(of_both)))
        tl.store(norms + record * tl.num_programs(1) + tl.program_id(1), norm)
    else:
        at = record * (ALL * SIZE) + channel
        tl.store(weight_samples + at, weight, mask=exists)
        tl.store(bias_samples + at, bias, mask=exists)


def tile(pixels: int, size: int, groups: int, element_size: int) -> tuple[dict, int]:
    """(span of a group, groups and pixels of a program; its warps)."""
    span, together, rows, _, _ = forward_tile(pixels, size, groups, element_size, MOST)
    return {"SPAN": span, "GROUPS": together, "P": rows}, 8 if rows * span * together >= MOST else 4


def _launch(x, grad, groups: int, eps: float, rows: int, *, samples: bool):
    records, channels, pixels = len(x) // rows, x.shape[1], x.shape[2] * x.shape[3]
    size = channels // groups
    constants, warps = tile(pixels, size, groups, x.element_size())
    across = triton.cdiv(groups, constants["GROUPS"])
    exact = {"dtype": torch.float32, "device": x.device}
    norms = None if samples else torch.empty(records, across, **exact)
    weight, bias = (torch.empty(records, channels, **exact) if samples else None for _ in range(2))
    numbers = (rows, pixels, *steps(x), *steps(grad), eps)
    constants |= {"SIZE": size, "ALL": groups, "num_warps": warps, "enable_fp_fusion": True}
    channel_sums[(records, across)](x, grad, norms, weight, bias, *numbers, **constants)
    return (weight, bias) if samples else over_tiles(norms)


def group_norm_grad_norms(call) -> torch.Tensor:
    """See kr_fast.ops.privacy.group_norm_grad_norms, where arguments are checked; both tensors are ``[R, C, H, W]`` of
    one dtype, contiguous or channels_last, and their records of fewer than 2^31 elements."""
    return _launch(*call, samples=False)


def group_norm_grad_samples(call) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`group_norm_grad_norms`."""
    return _launch(*call, samples=True)
