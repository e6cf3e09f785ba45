"""Triton kernels of model_conv2d_backward: gradients of M dense convolutions as implicit GEMMs.

Input: ``dx[pixel, c] = sum over (u, v, o) of dy[where (u, v) sends the pixel, o] weight[o, u, v, c]``. With a stride
the input's pixels fall into stride x stride classes; those of a class meet the same kernel positions (u, v), in a
launch of their own, so no product with the zeros between output pixels is taken. The weights are read as they lie.

Weight: ``dw[o, (u, v, c)] = sum over output pixels of dy[pixel, o] x[pixel seen by (u, v), c]``, with one more column
of ones for the bias. The pixels of a model are cut into parts by a rule of the layer's shape alone; each leaves a
partial sum, and a second kernel adds them in their order. No atomics, so a model's bits do not depend on the models
beside it.

Products go to the tensor cores in half precision and are exact in float32; sums are float32. Positions of one model's
pixels are 32-bit, which the op checks for the output; addresses of images and models are 64-bit.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.batched.model_conv2d import INTERPRETED, _pixels
from kr_fast.kernels.rounding import store

ROWS, PARTS = 2048, 32  # output pixels of a part at least, and parts of a model at most


@triton.jit
def input_gradient(
    grad, weight, out, images, height, width, out_height, out_width, class_height, class_width, tiles,
    C: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, U0: tl.constexpr, US: tl.constexpr, I0: tl.constexpr, IS: tl.constexpr,
    NU: tl.constexpr, V0: tl.constexpr, VS: tl.constexpr, J0: tl.constexpr, JS: tl.constexpr, NV: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr, ROUND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pixels ``(A + SH i, B + SW j)``: their ``NU x NV`` positions ``(U0 + US t, V0 + VS s)`` of the kernel, which see
    them from output pixel ``(i + I0 - IS t, j + J0 - JS s)``."""
    ACROSS: tl.constexpr = (C + BN - 1) // BN
    BLOCKS: tl.constexpr = (OUT + BK - 1) // BK
    program = tl.program_id(0)
    tile = program // ACROSS
    model = (tile // tiles).to(tl.int64)
    first = (tile - tile // tiles * tiles) * BM
    channel = program % ACROSS * BN + tl.arange(0, BN)
    exists = channel < C
    count = images * class_height * class_width
    image, after, row, column, live = _pixels(first, count, class_height, class_width, BM)
    source = grad + (model * images + image) * out_height * out_width * OUT
    start = after.to(tl.int64) * out_height * out_width * OUT
    kernels = weight + model * (OUT * KH * KW * C)
    lane = tl.arange(0, BK)

    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, NU * NV * BLOCKS, num_stages=STAGES):
        position = k // BLOCKS
        t = position // NV
        s = position - t * NV
        output = k % BLOCKS * BK + lane
        i, j = row + I0 - IS * t, column + J0 - JS * s
        inside = live & (i >= 0) & (i < out_height) & (j >= 0) & (j < out_width)
        at = (start + (i * out_width + j) * OUT)[:, None] + output[None, :]
        a = tl.load(source + at, mask=inside[:, None] & (output < OUT)[None, :], other=0.0)
        tap = (U0 + US * t) * KW + V0 + VS * s
        at = (output * (KH * KW) + tap)[:, None] * C + channel[None, :]
        b = tl.load(kernels + at, mask=(output < OUT)[:, None] & exists[None, :], other=0.0)
        if INTERPRET:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    pixel = (A + SH * row) * width + B + SW * column
    base = (model * images + image + after) * height * width + pixel
    store(out, (base * C)[:, None] + channel[None, :], acc, live[:, None] & exists[None, :], ROUND)


@triton.jit
def weight_gradient(
    grad, x, out, images, height, width, out_height, out_width, span, parts,
    C: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part's ``[O, KH KW C (+ 1)]``: BM output channels, BN columns, BK pixels at a time."""
    K: tl.constexpr = KH * KW * C
    COLUMNS: tl.constexpr = K + 1 if BIAS else K
    ACROSS: tl.constexpr = (COLUMNS + BN - 1) // BN
    DOWN: tl.constexpr = (OUT + BM - 1) // BM
    program = tl.program_id(0)
    part = program // (ACROSS * DOWN)
    model = (part // parts).to(tl.int64)
    output = program // ACROSS % DOWN * BM + tl.arange(0, BM)
    column = program % ACROSS * BN + tl.arange(0, BN)
    u, v, c = column // C // KW, column // C % KW, column % C
    size = out_height * out_width
    count = images * size
    begin = (part - part // parts * parts) * span
    end = tl.minimum(begin + span, count)
    lane = tl.arange(0, BK)
    source = x + model * images * height * width * C
    shift = (u * DH * width + v * DW) * C + c

    acc = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(begin, end, BK, num_stages=STAGES):
        pixel = first + lane
        live = pixel < end
        image = pixel // size
        position = pixel - image * size
        row = position // out_width
        top, left = row * SH - PH, (position - row * out_width) * SW - PW
        at = (model * count + pixel)[:, None] * OUT + output[None, :]
        a = tl.load(grad + at, mask=live[:, None] & (output < OUT)[None, :], other=0.0)
        i, j = top[:, None] + (u * DH)[None, :], left[:, None] + (v * DW)[None, :]
        inside = live[:, None] & (column < K)[None, :] & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        start = (image.to(tl.int64) * height + top) * width + left
        b = tl.load(source + (start * C)[:, None] + shift[None, :], mask=inside, other=0.0)
        if BIAS:
            b = tl.where((column == K)[None, :], 1.0, b.to(tl.float32)).to(b.dtype)
        if INTERPRET:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    at = (part.to(tl.int64) * OUT + output)[:, None] * COLUMNS + column[None, :]
    tl.store(out + at, acc, mask=(output < OUT)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def add_parts(
    partial, grad_weight, grad_bias, parts,
    K: tl.constexpr, OUT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = K + 1 if BIAS else K
    ACROSS: tl.constexpr = (OUT * COLUMNS + BLOCK - 1) // BLOCK
    model = (tl.program_id(0) // ACROSS).to(tl.int64)
    at = tl.program_id(0) % ACROSS * BLOCK + tl.arange(0, BLOCK)
    live = at < OUT * COLUMNS
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, parts):
        total += tl.load(partial + (model * parts + part) * (OUT * COLUMNS) + at, mask=live, other=0.0)
    output, column = at // COLUMNS, at % COLUMNS
    tl.store(grad_weight + model * (OUT * K) + output * K + column, total, mask=live & (column < K))
    if BIAS:
        tl.store(grad_bias + model * OUT + output, total, mask=live & (column == K))


def _power(value: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(value)))


def input_tile(channels: int, outputs: int, itemsize: int) -> dict:
    """The depth BK follows from the layer alone."""
    across = _power(channels, 64 if itemsize == 4 else 128)
    if itemsize == 4:
        return {"BM": 64, "BN": across, "BK": _power(outputs, 32), "STAGES": 2, "num_warps": 4}
    return {"BM": 128, "BN": across, "BK": _power(outputs, 64), "STAGES": 3, "num_warps": 8 if across == 128 else 4}


def weight_tile(columns: int, outputs: int, itemsize: int) -> dict:
    """A block of pixels (BK) is the order of a sum, and is the same for every layer of a dtype."""
    down = _power(outputs, 64)
    if itemsize == 4:
        return {"BM": down, "BN": _power(columns, 64), "BK": 16, "STAGES": 2, "num_warps": 4}
    return {"BM": down, "BN": _power(columns, 128), "BK": 64, "STAGES": 3, "num_warps": 8 if down == 64 else 4}


def classes(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[tuple[int, ...]]:
    """Of each class of an axis's pixels: (class, pixels, first position, step, first output, step, positions)."""
    table = []
    for a in range(min(stride, size)):
        positions = [u for u in range(kernel) if (a + padding - u * dilation) % stride == 0]
        step = positions[1] - positions[0] if len(positions) > 1 else 1
        first = positions[0] if positions else 0
        origin = (a + padding - first * dilation) // stride if positions else 0
        table.append((a, -(-(size - a) // stride), first, step, origin, step * dilation // stride, len(positions)))
    return table


def _constants(x, channels: int, outputs: int, kernel, options) -> dict:
    (kh, kw), (sh, sw) = kernel, options.stride
    constants = {"C": channels, "OUT": outputs, "KH": kh, "KW": kw, "SH": sh, "SW": sw, "INTERPRET": INTERPRETED}
    return constants | {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", "enable_fp_fusion": True}


def grad_input(grad, weight, size, options):
    """``[M, N, *size, C]``."""
    models, outputs, kh, kw, channels = weight.shape
    images, *out_size = grad.shape[1:4]
    out = torch.empty((models, images, *size, channels), dtype=grad.dtype, device=grad.device)
    tile = input_tile(channels, outputs, grad.element_size())
    constants = tile | _constants(grad, channels, outputs, (kh, kw), options)
    constants["ROUND"] = INTERPRETED and grad.dtype == torch.bfloat16
    axes = zip(size, (kh, kw), options.stride, options.padding, options.dilation, strict=True)
    vertical, horizontal = (classes(*axis) for axis in axes)
    for a, high, u0, us, i0, i_step, nu in vertical:
        constants |= {"A": a, "U0": u0, "US": us, "I0": i0, "IS": i_step, "NU": nu}
        for b, wide, v0, vs, j0, j_step, nv in horizontal:
            constants |= {"B": b, "V0": v0, "VS": vs, "J0": j0, "JS": j_step, "NV": nv}
            rows = triton.cdiv(images * high * wide, tile["BM"])
            grid = (models * rows * triton.cdiv(channels, tile["BN"]),)
            input_gradient[grid](grad, weight, out, images, *size, *out_size, high, wide, rows, **constants)
    return out


def split(rows: int) -> tuple[int, int]:
    """(rows of a part, parts) for a model's output pixels."""
    parts = max(1, min(PARTS, rows // ROWS))
    span = 64 * triton.cdiv(triton.cdiv(rows, parts), 64)
    return span, triton.cdiv(rows, span)


def grad_weight(grad, x, kernel, options, bias):
    """float32 ``[M, O, kh, kw, C]`` and, where ``bias``, ``[M, O]`` (else an empty tensor)."""
    models, images, height, width, channels = x.shape
    *out_size, outputs = grad.shape[2:]
    depth = kernel[0] * kernel[1] * channels
    columns = depth + bool(bias)
    span, parts = split(images * out_size[0] * out_size[1])
    tile = weight_tile(columns, outputs, x.element_size())
    (ph, pw), (dh, dw) = options.padding, options.dilation
    constants = {"PH": ph, "PW": pw, "DH": dh, "DW": dw, "BIAS": bool(bias)}
    constants |= tile | _constants(x, channels, outputs, kernel, options)
    partial = torch.empty(models * parts * outputs * columns, dtype=torch.float32, device=x.device)
    out = torch.empty((models, outputs, *kernel, channels), dtype=torch.float32, device=x.device)
    out_bias = torch.empty((models, outputs) if bias else (0,), dtype=torch.float32, device=x.device)
    grid = models * parts * triton.cdiv(outputs, tile["BM"]) * triton.cdiv(columns, tile["BN"])
    weight_gradient[(grid,)](grad, x, partial, images, height, width, *out_size, span, parts, **constants)
    constants = {"K": depth, "OUT": outputs, "BIAS": bool(bias), "BLOCK": 256, "num_warps": 2, "enable_fp_fusion": True}
    add_parts[(models * triton.cdiv(outputs * columns, 256),)](partial, out, out_bias, parts, **constants)
    return out, out_bias


def model_conv2d_backward(grad, x, weight, options, needed):
    """See kr_fast.ops.batched.model_conv2d_backward; arguments are checked there, and ``groups`` is 1."""
    if grad.numel() == 0:
        dw = torch.zeros_like(weight, dtype=torch.float32)
        return torch.zeros_like(x), dw, dw.new_zeros(weight.shape[:2])
    dx = grad_input(grad, weight, x.shape[2:4], options) if needed[0] else x.new_empty(0)
    if needed[1] or needed[2]:
        return dx, *grad_weight(grad, x, weight.shape[2:4], options, needed[2])
    return dx, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
