"""Triton kernels of group_norm_silu: one program takes whole groups of channels of one sample.

Channels lie next to each other (NHWC), so a program's tile is [pixels, channels]. Where the whole sample fits a tile it
stays in registers: one read. Else the statistics are taken tile by tile (Chan's rule) and a second sweep finds the
sample in L2. The channels of a group are padded to a power of two, SPAN, so that a group is an axis of its own.
Everything is float32 after the load; offsets of samples are 64-bit.
"""

import torch
import triton
import triton.language as tl

WHOLE = 8192  # elements of a tile that stays in registers
TILE = 4096  # elements of a tile that is read twice
ROW_BYTES = 128  # of adjacent channels that a program should read at a time


@triton.jit
def _load(x, skip, sample, pixel, channel, live, pixels, x_channels, skip_channels, HAS_SKIP: tl.constexpr):
    """[P, C] float32 of the concatenation; 0 where not live."""
    own = live & (channel < x_channels)[None, :]
    offset = sample * pixels * x_channels + pixel[:, None].to(tl.int64) * x_channels + channel[None, :]
    value = tl.load(x + offset, mask=own, other=0.0).to(tl.float32)
    if HAS_SKIP:
        other = live & (channel >= x_channels)[None, :]
        offset = sample * pixels * skip_channels + pixel[:, None].to(tl.int64) * skip_channels
        value += tl.load(skip + offset + (channel - x_channels)[None, :], mask=other, other=0.0).to(tl.float32)
    return value


@triton.jit
def _moments(value, live, count):
    """Mean over the first ``count`` pixels of each channel, and the sum of squares about it."""
    mean = tl.sum(value, axis=0) / count
    d = tl.where(live, value - mean[None, :], 0.0)
    return mean, tl.sum(d * d, axis=0)


@triton.jit
def _finish(value, scale, offset, SILU: tl.constexpr):
    y = value * scale[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def norm_kernel(
    x, skip, shift, weight, bias, y, means, rstds, pixels, x_channels, skip_channels, shift_stride, eps,
    SIZE: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr, P: tl.constexpr,
    WHOLE: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    channels = x_channels + skip_channels
    lane = tl.arange(0, GROUPS * SPAN)
    first = tl.program_id(1) * GROUPS
    if SIZE == SPAN:  # said apart, so that the compiler sees adjacent channels
        channel = first * SIZE + lane
        exists = channel < channels
    else:
        channel = (first + lane // SPAN) * SIZE + lane % SPAN
        exists = (first + lane // SPAN < ALL) & (lane % SPAN < SIZE)
    row = tl.arange(0, P)

    live = (row < pixels)[:, None] & exists[None, :]
    value = _load(x, skip, sample, row, channel, live, pixels, x_channels, skip_channels, HAS_SKIP)
    mean, squares = _moments(value, live, tl.minimum(pixels, P).to(tl.float32))
    if not WHOLE:
        for start in tl.range(P, pixels, P):
            live = (start + row < pixels)[:, None] & exists[None, :]
            value = _load(x, skip, sample, start + row, channel, live, pixels, x_channels, skip_channels, HAS_SKIP)
            before = start * 1.0
            count = tl.minimum(pixels - start, P).to(tl.float32)
            more, more_squares = _moments(value, live, count)
            d = more - mean
            mean += d * (count / (before + count))
            squares += more_squares + d * d * (before * (count / (before + count)))

    add = tl.zeros([GROUPS * SPAN], tl.float32)
    if HAS_SHIFT:
        add = tl.load(shift + sample * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)
    size = tl.cast(pixels, tl.float32)  # a function, for an argument of 1 is a constant, which has no method
    moved = tl.where(exists, mean + add, 0.0)
    centre = tl.sum(tl.reshape(moved, (GROUPS, SPAN)), axis=1) / SIZE
    centre = tl.reshape(tl.broadcast_to(centre[:, None], (GROUPS, SPAN)), (GROUPS * SPAN,))
    d = moved - centre
    spread = tl.where(exists, squares + size * d * d, 0.0)
    variance = tl.sum(tl.reshape(spread, (GROUPS, SPAN)), axis=1) / (size * SIZE)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = tl.reshape(tl.broadcast_to(inverse[:, None], (GROUPS, SPAN)), (GROUPS * SPAN,))
    if means is not None:  # one lane of each group writes
        at = sample * ALL + first + lane // SPAN
        tl.store(means + at, centre, mask=exists & (lane % SPAN == 0))
        tl.store(rstds + at, scale, mask=exists & (lane % SPAN == 0))
    if HAS_WEIGHT:
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    offset = (add - centre) * scale
    if HAS_BIAS:
        offset += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)

    base = y + sample * pixels * channels
    if WHOLE:
        out = _finish(value, scale, offset, SILU)
        place = row[:, None].to(tl.int64) * channels + channel[None, :]
        tl.store(base + place, out.to(y.dtype.element_ty), mask=live)
    else:
        for start in tl.range(0, pixels, P):
            pixel = start + row
            live = (pixel < pixels)[:, None] & exists[None, :]
            value = _load(x, skip, sample, pixel, channel, live, pixels, x_channels, skip_channels, HAS_SKIP)
            out = _finish(value, scale, offset, SILU)
            place = pixel[:, None].to(tl.int64) * channels + channel[None, :]
            tl.store(base + place, out.to(y.dtype.element_ty), mask=live)


def tile(pixels: int, size: int, groups: int, element_size: int, most: int = WHOLE) -> tuple[int, int, int, bool, int]:
    """(span of a group, groups, pixels, whether the sample fits ``most`` elements, warps) of a program."""
    span = triton.next_power_of_2(size)
    together = max(1, min(triton.next_power_of_2(groups), ROW_BYTES // element_size // span))
    rows = triton.next_power_of_2(max(pixels, 1))
    whole = rows * span * together <= most
    if not whole:
        rows = max(1, min(TILE, most) // (span * together))
    return span, together, rows, whole, 8 if rows * span * together >= 4096 else 4


def group_norm_silu(call, y: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor | None) -> None:
    """See kr_fast.ops.nn.group_norm_silu; arguments are checked there. ``y`` is channels_last and not empty."""
    x, skip, shift = call.x, call.skip, call.shift
    batch, channels, height, width = x.shape
    more, pixels, size = y.shape[1] - channels, height * width, y.shape[1] // call.groups
    span, together, rows, whole, warps = tile(pixels, size, call.groups, x.element_size())
    tensors = {"x": x, "skip": skip, "shift": shift, "weight": call.weight, "bias": call.bias}
    sizes = (pixels, channels, more, 0 if shift is None else shift.stride(0))
    constants = {f"HAS_{name.upper()}": value is not None for name, value in tensors.items() if name != "x"}
    constants |= {"SIZE": size, "SPAN": span, "GROUPS": together, "ALL": call.groups, "P": rows, "WHOLE": whole}
    norm_kernel[(batch, triton.cdiv(call.groups, together))](
        *tensors.values(),
        y,
        mean,
        rstd,
        *sizes,
        call.eps,
        **constants,
        SILU=call.silu,
        num_warps=warps,
        enable_fp_fusion=True,
    )
