"""Triton kernels of model_batch_norm: statistics of each model by chunks, then one pass over the numbers.

``x`` is ``[M, R, C]`` in memory, R = N H W rows of adjacent channels. A program takes BC channels of one chunk of rows
of one model, tile by tile, and leaves one partial result; a second kernel merges a model's partial results in their
order (Chan's rule for the variance). How rows are cut depends on R and C alone, so no bit of a model depends on the
models beside it, and no atomic is used. Everything is float32 after the load; offsets of models are 64-bit.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.batched.model_conv2d import INTERPRETED
from kr_fast.kernels.rounding import store

TILE = 2048  # elements of a tile
PARTS = 64  # chunks of a model at most


@triton.jit
def _chunk(rows, span, C: tl.constexpr, BC: tl.constexpr):
    """Of this program: its model, its chunk of rows (first, end) and number, its channels and which of them exist."""
    ACROSS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    parts = (rows + span - 1) // span
    part = program // ACROSS
    model = part // parts
    first = (part - model * parts) * span
    channel = program % ACROSS * BC + tl.arange(0, BC)
    return model.to(tl.int64), first, tl.minimum(first + span, rows), part, channel, channel < C


@triton.jit
def _tile(base, start, end, channel, exists, C: tl.constexpr, P: tl.constexpr):
    """Offsets ``[P, BC]`` of the rows from ``start`` on, and which of them are in the chunk."""
    row = start + tl.arange(0, P)
    live = (row < end)[:, None] & exists[None, :]
    return base + row[:, None].to(tl.int64) * C + channel[None, :], live


@triton.jit
def _load(source, at, live):
    return tl.load(source + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def moments(x, means, squares, rows, span, C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr):
    """Of each chunk: mean, and sum of squares about it. ``means``, ``squares``: ``[M, parts, C]``."""
    model, first, end, part, channel, exists = _chunk(rows, span, C, BC)
    source = x + model * rows * C
    mean, square = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in tl.range(first, end, P):
        at, live = _tile(0, start, end, channel, exists, C, P)
        value = _load(source, at, live)
        count = tl.minimum(end - start, P).to(tl.float32)
        before = (start - first).to(tl.float32)
        more = tl.sum(value, axis=0) / count
        d = tl.where(live, value - more[None, :], 0.0)
        step = more - mean
        mean += step * (count / (before + count))
        square += tl.sum(d * d, axis=0) + step * step * (before * (count / (before + count)))
    at = part.to(tl.int64) * C + channel
    tl.store(means + at, mean, mask=exists)
    tl.store(squares + at, square, mask=exists)


@triton.jit
def merge_moments(means, squares, mean, var, rows, span, C: tl.constexpr, BC: tl.constexpr):
    """``[M, parts, C]`` -> mean and biased variance ``[M, C]``."""
    ACROSS: tl.constexpr = (C + BC - 1) // BC
    model = (tl.program_id(0) // ACROSS).to(tl.int64)
    channel = tl.program_id(0) % ACROSS * BC + tl.arange(0, BC)
    exists = channel < C
    parts = (rows + span - 1) // span
    total, square = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for part in tl.range(0, parts):
        at = (model * parts + part) * C + channel
        count = tl.minimum(rows - part * span, span).to(tl.float32)
        before = (part * span).to(tl.float32)
        step = _load(means, at, exists) - total
        total += step * (count / (before + count))
        square += _load(squares, at, exists) + step * step * (before * (count / (before + count)))
    tl.store(mean + model * C + channel, total, mask=exists)
    tl.store(var + model * C + channel, square / rows, mask=exists)


@triton.jit
def _factors(weight, bias, mean, var, vector, exists, eps, BC: tl.constexpr):
    """Mean, scale and offset of ``y = (x - mean) scale + offset``."""
    scale = 1.0 / tl.sqrt(tl.load(var + vector, mask=exists, other=1.0) + eps)
    if weight is not None:
        scale *= _load(weight, vector, exists)
    offset = tl.zeros([BC], tl.float32)
    if bias is not None:
        offset = _load(bias, vector, exists)
    return _load(mean, vector, exists), scale, offset


@triton.jit
def _behind_relu(g, y, value, scale, offset, at, live):
    """``g`` where what stood before the ReLU was above 0: ``y`` tells, or ``value = x - mean``."""
    if y is not None:
        before = _load(y, at, live)
    else:
        before = value * scale[None, :] + offset[None, :]
    return tl.where(before <= 0, 0.0, g)  # NaN passes


@triton.jit
def normalize(
    x, weight, bias, residual, mean, var, y, rows, span, eps,
    C: tl.constexpr, RELU: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    model, first, end, _, channel, exists = _chunk(rows, span, C, BC)
    vector = model * C + channel
    centre, scale, offset = _factors(weight, bias, mean, var, vector, exists, eps, BC)
    base = model * rows * C
    for start in tl.range(first, end, P):
        at, live = _tile(base, start, end, channel, exists, C, P)
        value = _load(x, at, live)
        value = (value - centre[None, :]) * scale[None, :] + offset[None, :]
        if residual is not None:
            value += _load(residual, at, live)
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # NaN stays NaN
        store(y, at, value, live, ROUND)


@triton.jit
def sums(
    grad, x, y, weight, bias, mean, var, plain, centred, passed, rows, span, eps,
    C: tl.constexpr, RELU: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of each chunk: sums of g and of g (x - mean), g being ``grad`` behind the ReLU, written to ``passed``."""
    model, first, end, part, channel, exists = _chunk(rows, span, C, BC)
    centre, scale, offset = _factors(weight, bias, mean, var, model * C + channel, exists, eps, BC)
    base = model * rows * C
    one, two = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in tl.range(first, end, P):
        at, live = _tile(base, start, end, channel, exists, C, P)
        g = _load(grad, at, live)
        value = _load(x, at, live) - centre[None, :]
        if RELU:
            g = _behind_relu(g, y, value, scale, offset, at, live)
        if passed is not None:
            store(passed, at, g, live, ROUND)
        one += tl.sum(g, axis=0)
        two += tl.sum(tl.where(live, g * value, 0.0), axis=0)
    at = part.to(tl.int64) * C + channel
    tl.store(plain + at, one, mask=exists)
    tl.store(centred + at, two, mask=exists)


@triton.jit
def merge_sums(plain, centred, var, grad_weight, grad_bias, parts, eps, C: tl.constexpr, BC: tl.constexpr):
    """``[M, parts, C]`` -> the gradients of weight and bias, ``[M, C]``."""
    ACROSS: tl.constexpr = (C + BC - 1) // BC
    model = (tl.program_id(0) // ACROSS).to(tl.int64)
    channel = tl.program_id(0) % ACROSS * BC + tl.arange(0, BC)
    exists = channel < C
    one, two = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for part in tl.range(0, parts):
        at = (model * parts + part) * C + channel
        one += _load(plain, at, exists)
        two += _load(centred, at, exists)
    vector = model * C + channel
    scale = 1.0 / tl.sqrt(tl.load(var + vector, mask=exists, other=1.0) + eps)
    tl.store(grad_bias + vector, one, mask=exists)
    tl.store(grad_weight + vector, two * scale, mask=exists)


@triton.jit
def input_gradient(
    grad, x, y, weight, bias, mean, var, grad_weight, grad_bias, out, rows, span, eps,
    C: tl.constexpr, RELU: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``w r (g - mean(g) - n mean(g n))`` with ``r = 1 / sqrt(var + eps)`` and ``n = (x - mean) r``."""
    model, first, end, _, channel, exists = _chunk(rows, span, C, BC)
    vector = model * C + channel
    centre, scale, offset = _factors(weight, bias, mean, var, vector, exists, eps, BC)
    inverse = 1.0 / tl.sqrt(tl.load(var + vector, mask=exists, other=1.0) + eps)
    level = _load(grad_bias, vector, exists) / rows
    slope = inverse * _load(grad_weight, vector, exists) / rows
    base = model * rows * C
    for start in tl.range(first, end, P):
        at, live = _tile(base, start, end, channel, exists, C, P)
        g = _load(grad, at, live)
        value = _load(x, at, live) - centre[None, :]
        if RELU:
            g = _behind_relu(g, y, value, scale, offset, at, live)
        value = scale[None, :] * (g - level[None, :] - value * slope[None, :])
        store(out, at, value, live, ROUND)


def shape(rows: int, channels: int) -> tuple[int, dict, int]:
    """(rows of a chunk, tile, warps): a function of one model's shape alone."""
    across = min(64, triton.next_power_of_2(channels))
    tile = {"P": TILE // across, "BC": across}
    return tile["P"] * triton.cdiv(triton.cdiv(rows, tile["P"]), PARTS), tile, 4


def _grid(models: int, rows: int, span: int, channels: int, tile: dict) -> tuple[int]:
    return (models * triton.cdiv(rows, span) * triton.cdiv(channels, tile["BC"]),)


def forward(call):
    """See kr_fast.ops.batched.model_batch_norm; arguments are checked there."""
    x = call.x
    models, channels = len(x), x.shape[-1]
    rows = x[0].numel() // channels
    span, tile, warps = shape(rows, channels)
    y = torch.empty_like(x)
    mean, var = x.new_empty(2, models, channels, dtype=torch.float32)
    means, squares = x.new_empty(2, models, triton.cdiv(rows, span), channels, dtype=torch.float32)
    grid, few = _grid(models, rows, span, channels, tile), (models * triton.cdiv(channels, tile["BC"]),)
    options = {"C": channels, "BC": tile["BC"], "enable_fp_fusion": True}
    moments[grid](x, means, squares, rows, span, P=tile["P"], num_warps=warps, **options)
    merge_moments[few](means, squares, mean, var, rows, span, num_warps=1, **options)
    options |= {"RELU": call.relu, "ROUND": _rounds(x), "P": tile["P"], "num_warps": warps}
    normalize[grid](x, call.weight, call.bias, call.residual, mean, var, y, rows, span, call.eps, **options)
    return y, mean, var


def backward(call, bias=None):
    """The gradients of x, weight, bias and, where asked for behind a ReLU, of the residual (else an empty tensor).

    Without ``y``, ``x`` and ``bias`` tell where the ReLU let it pass.
    """
    grad, x, y, weight, mean, var, relu, residual, eps = call
    models, channels = len(x), x.shape[-1]
    rows = x[0].numel() // channels
    span, tile, warps = shape(rows, channels)
    out = torch.empty_like(x)
    passed = torch.empty_like(x) if residual else None
    grad_weight, grad_bias = x.new_empty(2, models, channels, dtype=torch.float32)
    parts = triton.cdiv(rows, span)
    plain, centred = x.new_empty(2, models, parts, channels, dtype=torch.float32)
    grid, few = _grid(models, rows, span, channels, tile), (models * triton.cdiv(channels, tile["BC"]),)
    options = {"C": channels, "BC": tile["BC"], "enable_fp_fusion": True}
    wide = {"P": tile["P"], "ROUND": _rounds(x), "num_warps": warps, **options}
    affine = (None, None) if y is not None else (weight, bias)
    sums[grid](grad, x, y, *affine, mean, var, plain, centred, passed, rows, span, eps, RELU=relu, **wide)
    merge_sums[few](plain, centred, var, grad_weight, grad_bias, parts, eps, num_warps=1, **options)
    behind, g = relu and passed is None, grad if passed is None else passed
    tensors = (g, x, y if behind else None, weight, bias, mean, var, grad_weight, grad_bias, out)
    input_gradient[grid](*tensors, rows, span, eps, RELU=behind, **wide)
    return out, grad_weight, grad_bias, x.new_empty(0) if passed is None else passed


def _rounds(x) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16
