"""A layer recipe bound to the weights of one model: BatchNorm folded in float64, then packed for the machine.

On a CPU convolutions run in oneDNN with weights that were reordered once and with the activation and the residual sum
in its epilogue, through the operators that torch's own inductor emits (``torch.ops.mkldnn``). Where this torch or
machine lacks them, the same layer runs through ``torch.nn.functional``.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.ensemble.graph.lowering import Activation, Layer
from kr_fast.ensemble.graph.precision import HALF, rounded
from kr_fast.ops.nn import winograd_conv2d
from kr_fast.ops.nn.winograd_pack import winograd_pack

LAST = torch.channels_last
# The bits of an image must not follow from how many images stand beside it. BLAS chooses its order of sums by the
# number of rows, so products have ROWS rows each; oneDNN does so for a single row alone, so its products have ROWS rows
# at least. torch's exponentials take the last elements, fewer than two vectors, by other code, so buffers of odd sizes
# are padded.
ROWS, VECTORS = 32, 32
USUAL_ROWS = 256  # for which weights of products are packed
# oneDNN takes the pixels of one image together, and a 1x1 convolution of fewer reads all weights for each image: as a
# product of all images' pixels by the weights it took a third (1 pixel) to two thirds (9) of the time.
FEW_PIXELS = 16
FOLDED = 1 << 17
_ACTIVATIONS: dict[str, Callable] = {
    "relu": lambda x, scalars, algorithm: x.relu_(),
    "swish": lambda x, scalars, algorithm: F.silu(x, inplace=True),
    "hardswish": lambda x, scalars, algorithm: F.hardswish(x, inplace=True),
    "hardtanh": lambda x, scalars, algorithm: x.clamp_(*scalars),
    "leaky_relu": lambda x, scalars, algorithm: F.leaky_relu(x, *scalars, inplace=True),
    "sigmoid": lambda x, scalars, algorithm: x.sigmoid_(),
    "tanh": lambda x, scalars, algorithm: x.tanh_(),
    "gelu": lambda x, scalars, algorithm: F.gelu(x, approximate=algorithm),
}


SIMPLE = ("relu", "hardtanh", "leaky_relu")  # one rounding: the same bits by any code


@functools.cache
def packs(device_type: str, dtype: torch.dtype) -> bool:
    """Whether convolutions of this type run with packed weights."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    names = "_convolution_pointwise _convolution_pointwise_ _reorder_convolution_weight _linear_pointwise"
    if not all(hasattr(ops, name) for name in (*names.split(), "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or bool(ops._is_mkldnn_bf16_supported())


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """float64 ``a``, ``b`` with ``norm(x) = a x + b`` in eval mode."""
    a = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        a = a * norm.weight.double()
    b = -norm.running_mean.double() * a
    return a, b if norm.bias is None else b + norm.bias.double()


def _filters(layer: Layer, model: nn.Module) -> Tensor:
    """The weight as the layer has it, without the taps that it leaves out."""
    weight = model.get_submodule(layer.module).weight
    return weight if layer.taps is None else weight[(slice(None), slice(None), *layer.taps)]


def folded(layer: Layer, model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64 with the BatchNorm in them."""
    if layer.kind == "affine":
        return _affine(model.get_submodule(layer.module))
    weight, (scale, bias) = _filters(layer, model).double(), _folds(layer, model)
    return weight if scale is None else weight * _as_filters(scale, weight), bias


def _folds(layer: Layer, model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """float64 ``a``, ``b`` with ``norm(conv(x)) = (a weight) x + b``; None for 1 and 0."""
    part = model.get_submodule(layer.module)
    bias = None if part.bias is None else part.bias.double()
    if layer.norm is None:
        return None, bias
    a, b = _affine(model.get_submodule(layer.norm))
    return a, b if bias is None else b + a * bias


def _as_filters(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


def _rounded(layer: Layer, model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight in ``dtype`` and bias in float64, a few outputs at a time: float64 holds some FOLDED numbers at most."""
    if layer.kind == "affine":
        weight, bias = _affine(model.get_submodule(layer.module))
        return weight.detach().to(dtype), bias.detach()
    whole, (scale, bias) = _filters(layer, model).detach(), _folds(layer, model)
    bias = None if bias is None else bias.detach()
    if scale is None and dtype not in HALF:
        return whole.to(dtype).contiguous(), bias
    weight = torch.empty_like(whole, dtype=dtype, memory_format=torch.contiguous_format)
    step = max(FOLDED // max(whole[:1].numel(), 1), 1)
    for start in range(0, len(whole), step):
        rows = slice(start, start + step)
        part = whole[rows].double()
        if scale is not None:
            part.mul_(_as_filters(scale.detach()[rows], part))
        weight[rows] = rounded(part, dtype)
    return weight, bias


def bind(layer: Layer, model: nn.Module, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """The layer as a function of its input of ``shape`` (and of the residual, where one is added)."""
    if layer.kind == "activation":
        act = _after(layer.activation)
        return lambda x: act(x.clone())
    if layer.winograd:
        return _winograd(layer, model)
    weight, bias = _rounded(layer, model, dtype)
    packed = packs(weight.device.type, dtype)
    # oneDNN adds a float32 bias before it rounds; torch's binding allows it where nothing else is added.
    exact = layer.kind == "conv" and packed and not layer.add
    bias = None if bias is None else bias.to(torch.float32 if exact and dtype in HALF else dtype)
    if layer.kind == "conv":
        return _conv(layer, model.get_submodule(layer.module), weight, bias, shape)
    if layer.kind == "linear":
        return _packed_linear(layer, weight, bias) if packed else _linear(weight, bias, _after(layer.activation))
    after = _after(layer.activation)
    if len(shape) == 4:
        weight, bias = weight.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)
    return lambda x: after(torch.addcmul(bias, x, weight))


def _linear(weight: Tensor, bias: Tensor | None, after: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if weight.device.type != "cpu":
        return lambda x: after(F.linear(x, weight, bias))

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        parts = [after(F.linear(part, weight, bias)) for part in _filled(rows, -len(rows) % ROWS).split(ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(rows)].view(*x.shape[:-1], len(weight))

    return product


def _filled(rows: Tensor, count: int) -> Tensor:
    """``rows`` ``[N, C]`` and ``count`` rows of zeros, contiguous."""
    return torch.cat([rows, rows.new_zeros(count, rows.shape[1])]) if count > 0 else rows.contiguous()


def _packed_linear(layer: Layer, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    product = _product(layer, weight, bias)
    return lambda x: product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(weight))


def _product(layer: Layer, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """``act(x W^T + b + other)`` of rows ``[R, C]`` by oneDNN, with the packed weight."""
    ops = torch.ops.mkldnn
    weight = ops._reorder_linear_weight(weight, USUAL_ROWS)
    name, scalars, algorithm = layer.activation or ("none", (), "")
    scalars, after = list(scalars), _after(layer.activation)

    def product(rows: Tensor, other: Tensor | None = None) -> Tensor:
        count = len(rows)
        rows = _filled(rows, ROWS - count)
        if other is None:
            return ops._linear_pointwise.default(rows, weight, bias, name, scalars, algorithm)[:count]
        other = _filled(other, ROWS - count)
        return after(ops._linear_pointwise.binary(rows, other, weight, bias, "add"))[:count]

    return product


def _after(activation: Activation | None) -> Callable[[Tensor], Tensor]:
    """In place where the size allows."""
    if activation is None:
        return lambda x: x
    name, scalars, algorithm = activation
    run = _ACTIVATIONS[name]

    def act(x: Tensor) -> Tensor:
        if name in SIMPLE or x.device.type != "cpu":
            return run(x, scalars, algorithm)
        strides = torch.empty_like(x).stride()  # of a dense tensor
        count = x.numel()
        if count % VECTORS or x.stride() != strides:
            padded = x.new_zeros(count + -count % VECTORS)
            padded.as_strided(x.shape, strides).copy_(x)
        else:
            padded = x.as_strided((count,), (1,), x.storage_offset())  # torch takes other code for other layouts, too
        y = run(padded, scalars, algorithm)
        return y.as_strided(x.shape, strides, y.storage_offset())

    return act


def _conv(layer: Layer, part: nn.Conv2d, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Callable:
    stride, padding, dilation, groups = list(layer.stride), list(layer.padding), list(part.dilation), part.groups
    point = weight.shape[2:] == (1, 1) and stride == [1, 1] and padding == [0, 0] and shape[2] * shape[3] < FEW_PIXELS
    whole = tuple(weight.shape[2:]) == tuple(shape[2:]) and padding == [0, 0] and dilation == [1, 1]
    if point and weight.device.type == "cpu" and groups == len(weight) == part.in_channels:
        return _scaled(layer, weight, bias)
    if (point or whole) and groups == 1 and packs(weight.device.type, weight.dtype):
        return _pixels(layer, weight, bias)
    if not packs(weight.device.type, weight.dtype):
        weight, after = weight.contiguous(memory_format=LAST), _after(layer.activation)

        def plain(x: Tensor, other: Tensor | None = None) -> Tensor:
            y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            return after(y if other is None else y.add_(other))

        return plain
    ops = torch.ops.mkldnn
    weight = ops._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(shape))
    name, scalars, algorithm = layer.activation or ("none", (), "")
    scalars = list(scalars)
    if not layer.add:
        run = ops._convolution_pointwise.default
        return lambda x: run(_dense(x), weight, bias, padding, stride, dilation, groups, name, scalars, algorithm)
    into, apart = ops._convolution_pointwise_.binary, ops._convolution_pointwise.binary
    unary = name if layer.activation else None

    def summed(x: Tensor, other: Tensor) -> Tensor:
        rest = (weight, bias, padding, stride, dilation, groups, "add", 1.0, unary, [], "")
        if layer.in_place and other.is_contiguous(memory_format=LAST):
            return into(other, _dense(x), *rest)
        return apart(_dense(x), other.contiguous(memory_format=LAST), *rest)

    return summed


def _scaled(layer: Layer, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """A depthwise filter of one tap."""
    weight, after = weight.view(1, -1, 1, 1), _after(layer.activation)
    bias = weight.new_zeros(()) if bias is None else bias.to(weight.dtype).view(1, -1, 1, 1)

    def run(x: Tensor, other: Tensor | None = None) -> Tensor:
        y = torch.addcmul(bias, _dense(x), weight)
        return after(y if other is None else y.add_(other))

    return run


def _pixels(layer: Layer, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """A 1x1 convolution of few pixels, or one by filters of the image's size, as one product for all images."""
    taps, outputs = weight[0, 0].numel(), len(weight)
    weight = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
    product = _product(layer, weight, None if bias is None else bias.to(weight.dtype))

    def run(x: Tensor, *other: Tensor) -> Tensor:
        height, width = x.shape[2:] if taps == 1 else (1, 1)
        rows = [_dense(x).permute(0, 2, 3, 1).reshape(-1, weight.shape[1])]
        rows += [_dense(each).permute(0, 2, 3, 1).reshape(-1, outputs) for each in other]
        return product(*rows).view(len(x), height, width, outputs).permute(0, 3, 1, 2)

    return run


# lowering's names of activations that are fused into winograd_conv2d
_WINOGRAD: dict[Activation | None, str | None] = {
    None: None,
    ("relu", (), ""): "relu",
    ("swish", (), ""): "silu",
    ("gelu", (), "none"): "gelu",
}


def _winograd(layer: Layer, model: nn.Module) -> Callable[..., Tensor]:
    part = model.get_submodule(layer.module)
    scale, bias = (None if each is None else each.detach() for each in _folds(layer, model))
    outputs, weight = part.out_channels, winograd_pack(part.weight.detach(), scale)
    scale = None
    if layer.pool_norm is not None:
        scale, shift = _affine(model.get_submodule(layer.pool_norm))
        bias = shift if bias is None else shift + scale * bias
    scale, bias = (None if each is None else each.detach().float() for each in (scale, bias))
    name = _WINOGRAD.get(layer.activation)
    after = _after(None if layer.activation in _WINOGRAD else layer.activation)
    run, pool = winograd_conv2d.unchecked, layer.pool
    if not layer.add:
        return lambda x: after(run(_dense(x), weight, outputs, scale, bias, None, name, pool))
    return lambda x, other: after(run(_dense(x), weight, outputs, scale, bias, _dense(other), name, pool))


def _dense(x: Tensor) -> Tensor:
    """channels_last without gaps: oneDNN's layout is decided by it, and so would be the last bits."""
    return x if x.is_contiguous(memory_format=LAST) else x.contiguous(memory_format=LAST)
