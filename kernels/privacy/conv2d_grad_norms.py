"""Triton kernels of conv2d_grad_norms and conv2d_grad_samples: the gradient of a filter bank record by record.

``dw[o, (u, v, c)] = sum over a record's output pixels of dy[pixel, o] x[pixel seen by (u, v), c]``, with one more
column of ones for the bias: a program holds one tile of one record's gradient in registers, squares and sums it, and
writes one number, or where samples are asked for the tile. The Gram form, ``sum over pairs of output pixels of <patch,
patch'> <dy, dy'>``, is not here: its terms cancel, in float32 to an error of the norm that clipping must not have.

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
def weight_gradients(
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


def tile(columns: int, outputs: int, itemsize: int) -> dict:
    """That of model_conv2d_backward; in float32 by twice the warps, for pixels side by side take registers too."""
    shape = weight_tile(columns, outputs, itemsize)
    return shape | ({"num_warps": 8} if itemsize == 4 and shape["BM"] * shape["BN"] == 64 * 64 else {})


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
    exact = {"dtype": torch.float32, "device": x.device}
    weight = torch.empty(records, grad.shape[1], channels, *kernel, **exact) if samples else None
    together = packed(groups, outputs)
    groups, channels, outputs = groups // together, channels * together, outputs * together
    constants = {"C": channels, "OUT": outputs, "GROUPS": groups, "PACKED": together, "BIAS": bias}
    pairs = {"K": kernel, "S": stride, "P": padding, "D": dilation}
    constants |= {f"{name}{axis}": n for name, pair in pairs.items() for axis, n in zip("HW", pair, strict=True)}
    constants |= {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", "INTERPRET": INTERPRETED}
    sizes = (rows, *x.shape[2:], *grad.shape[2:], *steps(x), *steps(grad))
    columns = kernel[0] * kernel[1] * channels + bias
    shape = tile(columns, outputs, x.element_size())
    tiles = groups * triton.cdiv(outputs, shape["BM"]) * triton.cdiv(columns, shape["BN"])
    norms = None if samples else torch.empty(records, tiles, **exact)
    of_bias = torch.empty(records, grad.shape[1], **exact) if samples and bias else None
    constants |= {"enable_fp_fusion": True, **shape}
    weight_gradients[(records * tiles,)](x, grad, norms, weight, of_bias, *sizes, **constants)
    return (weight, of_bias) if samples else over_tiles(norms)


def conv2d_grad_norms(call) -> torch.Tensor:
    """See kr_fast.ops.privacy.conv2d_grad_norms, where arguments are checked; both tensors are of one dtype, contiguous
    or channels_last, and their records of fewer than 2^31 elements."""
    return launch(*call, samples=False)


def conv2d_grad_samples(call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`conv2d_grad_norms`."""
    return launch(*call, samples=True)
