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

from kr_fast.ensemble.lowering import Activation, Layer
from kr_fast.ensemble.precision import HALF, rounded
from kr_fast.ops.winograd_conv2d import packed_shape, winograd_pack

LAST = torch.channels_last
# The bits of an image must not follow from how many images stand beside it. BLAS chooses its order of sums by the
# number of rows, so products have ROWS rows each; torch's exponentials take the last elements, fewer than two vectors,
# by other code, so buffers of odd sizes are padded.
ROWS, VECTORS = 32, 32
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
    names = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    if not all(hasattr(ops, name) for name in names):
        return False
    return dtype == torch.float32 or bool(ops._is_mkldnn_bf16_supported())


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """float64 ``a``, ``b`` with ``norm(x) = a x + b`` in eval mode."""
    a = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        a = a * norm.weight.double()
    b = -norm.running_mean.double() * a
    return a, b if norm.bias is None else b + norm.bias.double()


def folded(layer: Layer, model: nn.Module, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the outputs ``rows`` in float64 with the BatchNorm in them."""
    part = model.get_submodule(layer.module)
    if layer.kind == "affine":
        return _affine(part)
    weight, bias = part.weight[rows].double(), None if part.bias is None else part.bias[rows].double()
    if layer.norm is not None:
        a, b = (each[rows] for each in _affine(model.get_submodule(layer.norm)))
        weight = weight * a.view(-1, *[1] * (weight.ndim - 1))
        bias = b if bias is None else b + a * bias
    return weight, bias


def _rounded(layer: Layer, model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight in ``dtype`` and bias in float64, a few outputs at a time: float64 holds some FOLDED numbers at most."""
    if layer.kind == "affine":
        weight, bias = _affine(model.get_submodule(layer.module))
        return weight.detach().to(dtype), bias.detach()
    whole = model.get_submodule(layer.module).weight
    weight, biases = torch.empty_like(whole, dtype=dtype, memory_format=torch.contiguous_format), []
    step = max(FOLDED // max(whole[:1].numel(), 1), 1)
    for start in range(0, len(whole), step):
        rows = slice(start, start + step)
        part, bias = folded(layer, model, rows)
        weight[rows] = rounded(part.detach(), dtype)
        biases.append(bias)
    return weight.detach(), None if biases[0] is None else torch.cat(biases).detach()


def bind(layer: Layer, model: nn.Module, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """The layer as a function of its input of ``shape`` (and of the residual, where one is added)."""
    if layer.kind == "activation":
        act = _after(layer.activation)
        return lambda x: act(x.clone())
    if layer.winograd:
        return _winograd(layer, model)
    weight, bias = _rounded(layer, model, dtype)
    # oneDNN adds a float32 bias before it rounds; torch's binding allows it where nothing else is added.
    exact = layer.kind == "conv" and packs(weight.device.type, dtype) and not layer.add
    bias = None if bias is None else bias.to(torch.float32 if exact and dtype in HALF else dtype)
    if layer.kind == "conv":
        return _conv(layer, model.get_submodule(layer.module), weight, bias, shape)
    after = _after(layer.activation)
    if layer.kind == "linear":
        return _linear(weight, bias, after)
    if len(shape) == 4:
        weight, bias = weight.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)
    return lambda x: after(torch.addcmul(bias, x, weight))


def _linear(weight: Tensor, bias: Tensor | None, after: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if weight.device.type != "cpu":
        return lambda x: after(F.linear(x, weight, bias))

    def product(x: Tensor) -> Tensor:
        count, short = len(x), -len(x) % ROWS
        x = torch.cat([x, x.new_zeros(short, *x.shape[1:])]) if short else x.contiguous()
        found = [after(F.linear(part, weight, bias)) for part in x.split(ROWS)]
        return (found[0] if len(found) == 1 else torch.cat(found))[:count]

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
        found = run(padded, scalars, algorithm)
        return found.as_strided(x.shape, strides, found.storage_offset())

    return act


def _conv(layer: Layer, part: nn.Conv2d, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Callable:
    stride, padding, dilation, groups = list(layer.stride), list(layer.padding), list(part.dilation), part.groups
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


# lowering's names of activations that are fused into winograd_conv2d
_WINOGRAD: dict[Activation | None, str | None] = {
    None: None,
    ("relu", (), ""): "relu",
    ("swish", (), ""): "silu",
    ("gelu", (), "none"): "gelu",
}


def _winograd(layer: Layer, model: nn.Module) -> Callable[..., Tensor]:
    part, biases = model.get_submodule(layer.module), []
    weight, outputs = torch.empty(packed_shape(part.out_channels, part.in_channels)), part.out_channels
    block = weight.shape[3]
    blocks = max(FOLDED // (4 * part.in_channels * 9 * block), 1)  # transformed, a filter is four times as large
    for first in range(0, weight.shape[1], blocks):
        rows, bias = folded(layer, model, slice(first * block, (first + blocks) * block))
        rows = F.pad(rows.detach(), (0,) * 7 + (-len(rows) % block,))  # a last block is packed as the others
        weight[:, first : first + blocks] = winograd_pack(rows)
        biases.append(bias)
    scale, bias = None, None if biases[0] is None else torch.cat(biases)
    if layer.pool_norm is not None:
        scale, shift = _affine(model.get_submodule(layer.pool_norm))
        bias = shift if bias is None else shift + scale * bias
    scale, bias = (None if each is None else each.detach().float() for each in (scale, bias))
    name = _WINOGRAD.get(layer.activation)
    after = _after(None if layer.activation in _WINOGRAD else layer.activation)
    run, pool = torch.ops.kr_fast.winograd_conv2d.default, layer.pool
    if not layer.add:
        return lambda x: after(run(_dense(x), weight, outputs, scale, bias, None, name, pool))
    return lambda x, other: after(run(_dense(x), weight, outputs, scale, bias, _dense(other), name, pool))


def _dense(x: Tensor) -> Tensor:
    """channels_last without gaps: oneDNN's layout is decided by it, and so would be the last bits."""
    return x if x.is_contiguous(memory_format=LAST) else x.contiguous(memory_format=LAST)
