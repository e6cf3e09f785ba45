"""Triton kernels of conv2d_grad_norms and conv2d_grad_samples: the gradient of a filter bank record by record.

Direct: ``dw[o, (u, v, c)] = sum over a record's output pixels of dy[pixel, o] x[pixel seen by (u, v), c]``, with one
more column of ones for the bias: a program holds one tile of one record's gradient in registers, squares and sums it,
and writes one number, or where samples are asked for the tile. Gram: ``|dw|^2 = sum over pairs of output pixels of
<patch, patch'> <dy, dy'>``, a program for each record and group, where that takes fewer products.

A linear layer over T tokens is a 1x1 convolution of a 1 x T image. Pixels and channels lie at any two steps, so that
both layouts are read as they are. Products go to the tensor cores in half precision and are exact in float32; sums are
float32, without atomics, so the bits of a record depend on nothing beside it. Offsets within a record are 32-bit, those
of records 64-bit.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.batched.model_conv2d import INTERPRETED
from kr_fast.kernels.batched.model_conv2d_backward import weight_tile

GRAM_PIXELS = 64  # of a record at most: two [64, 64] sums are 64 registers a thread


@triton.jit
def norm_of(values, most):
    """The root of the sum of the squares, which float32 need not hold, of values of at most ``most``."""
    scale = tl.where((most > 0) & (most < float("inf")), most, 1.0)
    values = values / scale
    return scale * tl.sqrt(tl.sum(values * values))


@triton.jit
def _pixels(pixel, count, out_height, out_width):
    """Of output pixels of a record: row of the batch within the record, line, column, whether it exists."""
    size = out_height * out_width
    image = pixel // size
    position = pixel - image * size
    line = position // out_width
    return image, position, line, position - line * out_width, pixel < count


@triton.jit
def _patches(
    source, image, line, column, live, k, height, width, x_row, x_pixel, x_channel,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """``[pixels, k]``: what the filter's number k, in the order (u, v, c), meets; 0 outside the image."""
    tap, c = k // C, k % C
    u, v = tap // KW, tap % KW
    top, left = line * SH - PH, column * SW - PW
    i, j = top[:, None] + (u * DH)[None, :], left[:, None] + (v * DW)[None, :]
    inside = live[:, None] & (k < KH * KW * C)[None, :] & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    start = image * x_row + (top * width + left) * x_pixel
    shift = (u * DH * width + v * DW) * x_pixel + c * x_channel
    return tl.load(source + start[:, None] + shift[None, :], mask=inside, other=0.0)


@triton.jit
def _signals(source, image, position, live, output, grad_row, grad_pixel, grad_channel, OUT: tl.constexpr):
    """``[pixels, output]``."""
    start = image * grad_row + position * grad_pixel
    mask = live[:, None] & (output < OUT)[None, :]
    return tl.load(source + start[:, None] + (output * grad_channel)[None, :], mask=mask, other=0.0)


@triton.jit
def direct(
    x, grad, norms, samples, bias_samples, rows, height, width, out_height, out_width,
    x_row, x_pixel, x_channel, grad_row, grad_pixel, grad_channel,
    C: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The norm of a tile of BM outputs by BN columns, BK pixels at a time; ``rows`` make a record.

    C and OUT are the channels of PACKED groups of the layer side by side, of which a tile takes the blocks on the
    diagonal, so that groups of few channels fill it.
    """
    K: tl.constexpr = KH * KW * C
    COLUMNS: tl.constexpr = K + 1 if BIAS else K
    ACROSS: tl.constexpr = (COLUMNS + BN - 1) // BN
    DOWN: tl.constexpr = (OUT + BM - 1) // BM
    program = tl.program_id(0)
    part = program // (ACROSS * DOWN)
    group = part % GROUPS
    record = (part // GROUPS).to(tl.int64)
    output = program // ACROSS % DOWN * BM + tl.arange(0, BM)
    k = program % ACROSS * BN + tl.arange(0, BN)
    seen = x + record * rows * x_row + group * C * x_channel
    signal = grad + record * rows * grad_row + group * OUT * grad_channel
    count = rows * out_height * out_width
    lane = tl.arange(0, BK)

    acc = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(0, count, BK, num_stages=STAGES):
        image, position, line, column, live = _pixels(first + lane, count, out_height, out_width)
        a = _signals(signal, image, position, live, output, grad_row, grad_pixel, grad_channel, OUT)
        b = _patches(
            seen, image, line, column, live, k, height, width, x_row, x_pixel, x_channel,
            C, KH, KW, SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        if BIAS:
            b = tl.where((k == K)[None, :], 1.0, b.to(tl.float32)).to(b.dtype)
        if INTERPRET:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    c = k % C
    real = (output < OUT)[:, None] & (k < K)[None, :]
    if PACKED > 1:
        real = real & ((output // (OUT // PACKED))[:, None] == (c // (C // PACKED))[None, :])
        acc = tl.where(real | (k == K)[None, :], acc, 0.0)
    if samples is None:
        tl.store(norms + program, norm_of(acc, tl.max(tl.abs(acc))))
    else:
        samples += record * (GROUPS * OUT * (K // PACKED))
        filters = group * OUT + output
        at = filters[:, None] * (K // PACKED) + (c % (C // PACKED) * (KH * KW) + k // C)[None, :]
        tl.store(samples + at, acc, mask=real)
        if BIAS:
            at = filters[:, None] + (k - K)[None, :]
            tl.store(bias_samples + record * (GROUPS * OUT) + at, acc, mask=(output < OUT)[:, None] & (k == K)[None, :])


@triton.jit
def gram(
    x, grad, norms, rows, height, width, out_height, out_width,
    x_row, x_pixel, x_channel, grad_row, grad_pixel, grad_channel,
    C: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The norm of a group of a record of at most BM pixels."""
    program = tl.program_id(0)
    group = program % GROUPS
    record = (program // GROUPS).to(tl.int64)
    seen = x + record * rows * x_row + group * C * x_channel
    signal = grad + record * rows * grad_row + group * OUT * grad_channel
    pixel = tl.arange(0, BM)
    count = rows * out_height * out_width
    image, position, line, column, live = _pixels(pixel, count, out_height, out_width)
    lane = tl.arange(0, BK)

    patches = tl.zeros([BM, BM], tl.float32)
    for first in tl.range(0, KH * KW * C, BK, num_stages=STAGES):
        b = _patches(
            seen, image, line, column, live, first + lane, height, width, x_row, x_pixel, x_channel,
            C, KH, KW, SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        if INTERPRET:
            b = b.to(tl.float32)
        patches = tl.dot(b, tl.trans(b), patches, input_precision=PRECISION)
    if BIAS:
        patches += 1.0
    most = tl.zeros([BM], tl.float32)  # of the signals, which are scaled by a power of 2 so that float32 holds squares
    for first in tl.range(0, OUT, BK):
        a = _signals(signal, image, position, live, first + lane, grad_row, grad_pixel, grad_channel, OUT)
        most = tl.maximum(most, tl.max(tl.abs(a.to(tl.float32)), axis=1))
    exponent = tl.minimum(tl.maximum((tl.max(most).to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    signals = tl.zeros([BM, BM], tl.float32)
    for first in tl.range(0, OUT, BK, num_stages=STAGES):
        a = _signals(signal, image, position, live, first + lane, grad_row, grad_pixel, grad_channel, OUT)
        a = (a.to(tl.float32) * inverse).to(tl.float32 if INTERPRET else a.dtype)
        signals = tl.dot(a, tl.trans(a), signals, input_precision=PRECISION)
    square = tl.sum(patches * signals)
    tl.store(norms + program, scale * tl.sqrt(tl.where(square < 0, 0.0, square)))  # a NaN stays


def tile(columns: int, outputs: int, itemsize: int) -> dict:
    """That of model_conv2d_backward; in float32 by twice the warps, for pixels side by side take registers too."""
    shape = weight_tile(columns, outputs, itemsize)
    return shape | ({"num_warps": 8} if itemsize == 4 and shape["BM"] * shape["BN"] == 64 * 64 else {})


def gram_tile(pixels: int, itemsize: int) -> dict:
    span = max(16, triton.next_power_of_2(pixels))
    return {"BM": span, "BK": 16 if itemsize == 4 else 64, "STAGES": 2, "num_warps": 8 if span == 64 else 4}


def takes_gram(pixels: int, columns: int, outputs: int, itemsize: int) -> bool:
    """Whether the Gram form takes less than half as many products, padding included, so that it may wait more."""
    if pixels > GRAM_PIXELS:
        return False
    shape, span = tile(columns, outputs, itemsize), gram_tile(pixels, itemsize)["BM"]

    def whole(count: int, block: int) -> int:
        return triton.cdiv(count, block) * block

    products = whole(columns, shape["BN"]) * whole(outputs, shape["BM"]) * whole(pixels, shape["BK"])
    return 2 * span * span * (columns + outputs) < products


def packed(groups: int, outputs: int) -> int:
    """Groups of the layer that a tile takes together: 16 outputs or fewer, which a tile has anyway."""
    return max(n for n in range(1, max(2, 16 // outputs + 1)) if groups % n == 0)


def steps(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Elements from a row, a pixel and a channel of ``[N, C, H, W]``, contiguous or channels_last, to the next."""
    _, channels, height, width = tensor.shape
    adjacent = tensor.is_contiguous()
    return channels * height * width, 1 if adjacent else channels, height * width if adjacent else 1


def over_tiles(norms: torch.Tensor) -> torch.Tensor:
    """``[B]`` of the norms of a record's tiles, ``[B, tiles]``."""
    return torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64).float()


def launch(x, grad, kernel, stride, padding, dilation, groups: int, bias: bool, rows: int, *, samples: bool):
    """The norms, or the gradients of weight and bias, of which the latter is None without ``bias``."""
    records, channels, outputs = len(x) // rows, x.shape[1] // groups, grad.shape[1] // groups
    columns, pixels = kernel[0] * kernel[1] * channels + bias, rows * grad.shape[2] * grad.shape[3]
    constants = {"C": channels, "OUT": outputs, "GROUPS": groups, "BIAS": bias, "INTERPRET": INTERPRETED}
    pairs = {"K": kernel, "S": stride, "P": padding, "D": dilation}
    constants |= {f"{name}{axis}": n for name, pair in pairs.items() for axis, n in zip("HW", pair, strict=True)}
    constants["PRECISION"] = "ieee" if x.dtype == torch.float32 else "tf32"
    sizes = (rows, *x.shape[2:], *grad.shape[2:], *steps(x), *steps(grad))
    exact = {"dtype": torch.float32, "device": x.device}
    if not samples and takes_gram(pixels, columns, outputs, x.element_size()):
        norms = torch.empty(records, groups, **exact)
        gram[(norms.numel(),)](x, grad, norms, *sizes, **constants, **gram_tile(pixels, x.element_size()))
        return over_tiles(norms)
    weight = torch.empty(records, grad.shape[1], channels, *kernel, **exact) if samples else None
    together = packed(groups, outputs)
    groups, channels, outputs = groups // together, channels * together, outputs * together
    constants |= {"C": channels, "OUT": outputs, "GROUPS": groups, "PACKED": together}
    columns = kernel[0] * kernel[1] * channels + bias
    shape = tile(columns, outputs, x.element_size())
    tiles = groups * triton.cdiv(outputs, shape["BM"]) * triton.cdiv(columns, shape["BN"])
    norms = None if samples else torch.empty(records, tiles, **exact)
    of_bias = torch.empty(records, grad.shape[1], **exact) if samples and bias else None
    direct[(records * tiles,)](x, grad, norms, weight, of_bias, *sizes, **constants, **shape)
    return (weight, of_bias) if samples else over_tiles(norms)


def conv2d_grad_norms(call) -> torch.Tensor:
    """See kr_fast.ops.privacy.conv2d_grad_norms, where arguments are checked; both tensors are of one dtype, contiguous
    or channels_last, and their records of fewer than 2^31 elements."""
    return launch(*call, samples=False)


def conv2d_grad_samples(call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`conv2d_grad_norms`."""
    return launch(*call, samples=True)
