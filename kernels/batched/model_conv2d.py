"""Triton kernels of model_conv2d: an implicit GEMM, and a depthwise kernel.

A dense convolution is a product ``[pixels, K] @ [K, O]`` for each model, K = (kernel row, kernel column, channel) in
this order, whose left side is gathered from the image and never stored. A program takes BM output pixels of one model
and BN output channels. Where a block of K lies within one kernel position (C a multiple of BK) its coordinates are
scalars; else (a stem's 3 channels, 16 channels) a block holds several positions and each of its columns has its own.
Where all models see the same input, the columns are those of all models, so the input is gathered once for BN / O of
them.

A sum's order depends on BK alone, which follows from the layer's shape: the other tile sizes, the number of images and
the models beside it change no bit. Each pixel is gathered kh * kw times, so loads of the input go through L1, where
the neighbours' taps find them. Offsets of models and images are 64-bit, within a tile 32-bit.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.rounding import store


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """By the series near 0, where the quotient would lose digits."""
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(s < 0.0625, near, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def _activate(y, low, high, ACT: tl.constexpr):
    """NaN stays NaN."""
    if ACT == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACT == "swish":
        y = y * _sigmoid(y)
    elif ACT == "sigmoid":
        y = _sigmoid(y)
    elif ACT == "tanh":
        y = _tanh(y)
    elif ACT == "hardswish":
        gate = tl.where(y + 3.0 > 6.0, 6.0, y + 3.0)
        y = y * tl.where(gate < 0.0, 0.0, gate) * (1.0 / 6.0)
    elif ACT == "leaky_relu":
        y = tl.where(y > 0, y, y * low)
    elif ACT == "hardtanh":
        y = tl.where(y > high, high, y)
        y = tl.where(y < low, low, y)
    elif ACT == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = 0.5 * y * (1.0 + _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    return y


@triton.jit
def _pixels(first, count, out_height, out_width, B: tl.constexpr):
    """Of ``B`` output pixels from ``first`` on: image of the first, and for each image after it, row, column, live."""
    size = out_height * out_width
    image = first // size
    position = first - image * size + tl.arange(0, B)
    after = position // size
    position -= after * size
    row = position // out_width
    return image, after, row, position - row * out_width, first + tl.arange(0, B) < count


@triton.jit
def dense(
    x, weight, bias, residual, rows, columns, scale, shift, y, images, height, width, in_height, in_width,
    out_height, out_width, tiles, low, high, models: tl.constexpr,
    C: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SHARED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``in_height`` x ``in_width`` pixels lie in memory, of which the convolution sees ``height`` x ``width``."""
    K: tl.constexpr = KH * KW * C
    COLUMNS: tl.constexpr = OUT * models if SHARED else OUT
    ACROSS: tl.constexpr = (COLUMNS + BN - 1) // BN
    program = tl.program_id(0)
    tile = program // ACROSS  # programs side by side read the same pixels
    model = (tile // tiles).to(tl.int64)
    first = (tile - tile // tiles * tiles) * BM
    column = program % ACROSS * BN + tl.arange(0, BN)
    exists = column < COLUMNS
    filters = column.to(tl.int64) if COLUMNS * K >= 2**31 else column  # those of all models where they share the input
    count = images * out_height * out_width
    image, after, row, position, live = _pixels(first, count, out_height, out_width, BM)
    top, left = row * SH - PH, position * SW - PW
    source = x + (model * images + image) * (in_height * in_width * C)
    start = after.to(tl.int64) * in_height * in_width * C
    kernels = weight + model * (OUT * K)

    acc = tl.zeros([BM, BN], tl.float32)
    lane = tl.arange(0, BK)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + lane
        if C % BK == 0:  # one place of the kernel
            u = k0 // C // KW
            v = k0 // C - u * KW
            channel = k0 % C + lane
            i, j = top + u * DH, left + v * DW
            inside = live & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            if rows is not None:
                i = tl.load(rows + i, mask=inside, other=0)
                j = tl.load(columns + j, mask=inside, other=0)
            at = (start + (i * in_width + j) * C)[:, None] + channel[None, :]
            inside = inside[:, None] & (lane < BK)[None, :]
        else:
            u = k // C // KW
            v = k // C - u * KW
            channel = k % C
            i, j = top[:, None] + (u * DH)[None, :], left[:, None] + (v * DW)[None, :]
            inside = live[:, None] & (k < K)[None, :] & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            if rows is not None:
                i = tl.load(rows + i, mask=inside, other=0)
                j = tl.load(columns + j, mask=inside, other=0)
            at = start[:, None] + ((i * in_width + j) * C + channel[None, :])
        if rows is None:
            a = tl.load(source + at, mask=inside, other=0.0, cache_modifier=".ca")
        else:
            byte = tl.load(source + at, mask=inside, other=0).to(tl.float32)
            valid = k < K
            factor = tl.load(scale + channel, mask=valid, other=0.0)
            offset = tl.load(shift + channel, mask=valid, other=0.0)
            value = tl.where(inside, byte * factor[None, :] + offset[None, :], 0.0)
            a = value.to(weight.dtype.element_ty)
        taken = exists[None, :] & (k < K)[:, None]
        b = tl.load(kernels + filters[None, :] * K + k[:, None], mask=taken, other=0.0)
        if INTERPRET:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if bias is not None:
        acc += tl.load(bias + model * OUT + column, mask=exists, other=0.0)[None, :]
    if SHARED:
        owner = column // OUT
        column -= owner * OUT
        base = (owner.to(tl.int64) * count)[None, :] + (first + tl.arange(0, BM))[:, None]
    else:
        base = (model * count + (first + tl.arange(0, BM)))[:, None]
    at = base * OUT + column[None, :]
    mask = live[:, None] & exists[None, :]
    if residual is not None:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    store(y, at, _activate(acc, low, high, ACT), mask, INTERPRET and y.dtype.element_ty == tl.bfloat16)


@triton.jit
def depthwise(
    x, weight, bias, residual, rows, columns, scale, shift, y, images, height, width, in_height, in_width,
    out_height, out_width, tiles, low, high,
    C: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SHARED: tl.constexpr, ACT: tl.constexpr, INTERPRET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each output channel reads one input channel; a program takes BM pixels and BN channels."""
    ACROSS: tl.constexpr = (OUT + BN - 1) // BN
    program = tl.program_id(0)
    tile = program // ACROSS
    model = (tile // tiles).to(tl.int64)
    first = (tile - tile // tiles * tiles) * BM
    column = program % ACROSS * BN + tl.arange(0, BN)
    exists = column < OUT
    channel = column // (OUT // C)
    count = images * out_height * out_width
    image, after, row, position, live = _pixels(first, count, out_height, out_width, BM)
    top, left = row * SH - PH, position * SW - PW
    origin = (model * 0 if SHARED else model * images) + image
    source = x + origin * (in_height * in_width * C)
    start = after.to(tl.int64) * in_height * in_width * C
    if rows is not None:
        factor = tl.load(scale + channel, mask=exists, other=0.0)
        offset = tl.load(shift + channel, mask=exists, other=0.0)

    acc = tl.zeros([BM, BN], tl.float32)
    for tap in tl.static_range(KH * KW):
        i, j = top + tap // KW * DH, left + tap % KW * DW
        inside = live & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        if rows is not None:
            i = tl.load(rows + i, mask=inside, other=0)
            j = tl.load(columns + j, mask=inside, other=0)
        at = (start + (i * in_width + j) * C)[:, None] + channel[None, :]
        both = inside[:, None] & exists[None, :]
        value = tl.load(source + at, mask=both, other=0).to(tl.float32)
        if rows is not None:
            value = (value * factor[None, :] + offset[None, :]).to(weight.dtype.element_ty).to(tl.float32)
            value = tl.where(both, value, 0.0)
        kernel = weight + (model * OUT + column) * (KH * KW) + tap
        acc += value * tl.load(kernel, mask=exists, other=0.0).to(tl.float32)[None, :]

    if bias is not None:
        acc += tl.load(bias + model * OUT + column, mask=exists, other=0.0)[None, :]
    at = (model * count + (first + tl.arange(0, BM)))[:, None] * OUT + column[None, :]
    mask = live[:, None] & exists[None, :]
    if residual is not None:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    store(y, at, _activate(acc, low, high, ACT), mask, INTERPRET and y.dtype.element_ty == tl.bfloat16)


INTERPRETED = not isinstance(dense, triton.JITFunction)


def tiles(channels: int, kernel, itemsize: int, shared: bool, models: int) -> list[dict]:
    """Tile shapes for weights ``[models, O, kh, kw, channels]``, ``kernel`` = (O, kh, kw): the one expected best first.

    BK follows from the layer alone, so all of them give the same bits. In half precision the tensor cores of compute
    capability 9 take 64 rows and four warps at least, which all shapes have, so they issue one kind of instruction.
    With 16 channels a block of 64 holds four of nine positions, and a quarter of the products are of zeros: three
    rounds of loads instead of five or nine, where tensor cores wait for memory anyway.
    """
    outputs, kh, kw = kernel
    depth = kh * kw * channels
    across = min(128, max(16, triton.next_power_of_2(outputs * models if shared else outputs)))
    if itemsize == 4:  # no tensor cores: products in registers, which a wider tile would not fit
        block = 16 if channels % 32 else 32
        columns = sorted({min(across, 64), min(across, 32)}, reverse=True)
        return [{"BM": 64, "BN": each, "BK": block, "STAGES": 2, "num_warps": 4} for each in columns]
    block = 64 if channels % 64 == 0 or (channels % 32 and 64 <= depth <= 192) else 32
    # 99 KiB of shared memory, what a block has on compute capability 8.6; 128 x 128 in float32 are 64 registers a
    # thread of 8 warps.
    tall = {"BM": 256, "BN": min(across, 64), "BK": block, "STAGES": 2 if block == 64 else 3, "num_warps": 8}
    if across == 128:
        return [
            {"BM": 128, "BN": 128, "BK": block, "STAGES": 3, "num_warps": 8},
            {"BM": 128, "BN": 64, "BK": block, "STAGES": 3, "num_warps": 4},
            tall,
        ]
    return [
        {"BM": 128, "BN": across, "BK": block, "STAGES": 3, "num_warps": 4},
        tall,
        {"BM": 64, "BN": across, "BK": block, "STAGES": 4, "num_warps": 4},
    ]


def depthwise_tile(outputs: int) -> dict:
    """At most 32 elements a thread; 64 adjacent channels are two cache lines in half precision."""
    across = min(64, triton.next_power_of_2(outputs))
    return {"BM": max(16, 2048 // across), "BN": across, "num_warps": 4}


def model_conv2d(x, weight, bias, residual, view, options):
    """See ops/batched/model_conv2d.py, where arguments are checked; ``options`` as in backends/arguments.py, with
    ``groups`` 1 or the input's channels."""
    models, outputs, kh, kw, _ = weight.shape
    _, images, in_height, in_width, channels = x.shape
    size = (in_height, in_width) if view is None else (len(view.rows), len(view.columns))
    out = options.output_size(size, (kh, kw))
    y = torch.empty((models, images, *out, outputs), dtype=weight.dtype, device=x.device)
    if y.numel() == 0:
        return y
    name, scalars, algorithm = options.activation or ("", (), "")
    bounds = [float(each) for each in (*scalars, 0.0, 0.0)[:2]]
    shared = len(x) == 1 and models > 1
    (sh, sw), (ph, pw), (dh, dw) = options[:3]
    constants = {"C": channels, "OUT": outputs, "KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}
    constants |= {"DH": dh, "DW": dw, "SHARED": shared, "INTERPRET": INTERPRETED}
    constants["ACT"] = "gelu_tanh" if algorithm == "tanh" else name
    if options.groups != 1:
        kernel, tile, across, repeats = depthwise, depthwise_tile(outputs), outputs, models
    else:
        table = tiles(channels, (outputs, kh, kw), weight.element_size(), shared, models)
        kernel, tile = dense, table[min(options.config, len(table) - 1)]
        across, repeats = (outputs * models, 1) if shared else (outputs, models)
        precision = "ieee" if weight.dtype == torch.float32 else "tf32"
        constants |= {"models": models if shared else 1, "PRECISION": precision}
    rows = triton.cdiv(images * out[0] * out[1], tile["BM"])
    grid = (repeats * rows * triton.cdiv(across, tile["BN"]),)
    tensors, sizes = (x, weight, bias, residual, *(view or (None,) * 4), y), (images, *size, in_height, in_width, *out)
    kernel[grid](*tensors, *sizes, rows, *bounds, **constants, **tile, enable_fp_fusion=True)
    return y
