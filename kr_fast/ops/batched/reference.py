"""Ops over many models in plain torch: the definitions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kr_fast.backends.arguments import BatchNorm, BatchNormGradient, ConvOptions, ModelResidualBlock, Sgd
from kr_fast.backends.exact import float32_products
from kr_fast.backends.registry import Differentiable, differentiable, kernel, never

_ACTIVATIONS = {"relu": torch.relu, "swish": F.silu, "hardswish": F.hardswish, "sigmoid": torch.sigmoid}
_ACTIVATIONS |= {"tanh": torch.tanh, "leaky_relu": F.leaky_relu, "hardtanh": F.hardtanh}
_ACTIVATIONS |= {"gelu": lambda x, approximate: F.gelu(x, approximate=approximate)}


@kernel("model_conv2d", "reference", refuses=never)
def model_conv2d(x, weight, bias, residual, view, options: ConvOptions) -> Tensor:
    """A convolution a model, in float32 at least, channels moved to torch's place and back."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    if view is not None:
        x = x[:, :, view.rows.long()[:, None], view.columns.long()] * view.scale + view.shift
        x = x.to(weight.dtype)
    x, kernels = (each.to(exact).movedim(-1, 2) for each in (x, weight))
    with float32_products(enabled=True, benchmark=False):
        y = [F.conv2d(x[m if len(x) > 1 else 0], each, None, *options[:4]) for m, each in enumerate(kernels)]
    y = torch.stack(y).movedim(2, -1)
    if bias is not None:
        y = y + bias[:, None, None, None]
    if residual is not None:
        y = y + residual
    if options.activation is not None:
        name, scalars, algorithm = options.activation
        y = _ACTIVATIONS[name](y, *scalars, *([algorithm] if algorithm else []))
    return y.to(weight.dtype).contiguous()


@kernel("model_residual_block", "reference", refuses=never)
def model_residual_block(call: ModelResidualBlock) -> Tensor:
    """Its layers one after the other: what one hands to the next is rounded."""
    x, inner, scale, shift = call.x, call.x, call.scale, call.shift
    if scale is not None:
        inner = (x.to(scale.dtype) * scale[:, None, None, None] + shift[:, None, None, None]).relu().to(x.dtype)
    linear = ConvOptions(padding=(1, 1))
    rectified = linear._replace(activation=("relu", (), ""))
    middle = model_conv2d(inner, call.weight1, call.bias1, None, None, rectified)
    return model_conv2d(middle, call.weight2, call.bias2, x, None, rectified if call.relu else linear)


@kernel("model_conv2d_backward", "reference", refuses=never)
def model_conv2d_backward(grad, x, weight, options: ConvOptions, needed):
    """torch's own gradients of each model's convolution, in float32 at least.

    Channels stand second in memory here, and the strides of a 1x1 filter say so: for a strided 1x1 convolution of few
    channels in channels_last oneDNN takes a wrong weight gradient (oneDNN issue 6035), or writes beyond its end.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    parts = []
    with float32_products(enabled=True, benchmark=False, deterministic=True):
        for m in range(len(x)):
            own = (each[m].to(exact).movedim(-1, 1) for each in (grad, x, weight))
            g, a, w = (torch.empty(each.shape, dtype=exact, device=each.device).copy_(each) for each in own)
            geometry = (*options[:3], False, [0, 0], options.groups)
            dx, dw, db = torch.ops.aten.convolution_backward(g, a, w, [len(w)], *geometry, list(needed))
            dx = x.new_empty(0) if dx is None else dx.movedim(1, -1).to(x.dtype)
            dw = a.new_empty(0) if dw is None else dw.movedim(1, -1)
            parts.append((dx, dw, a.new_empty(0) if db is None else db))
    dx, dw, db = (torch.stack(each) if each[0].numel() else each[0] for each in zip(*parts, strict=True))
    if needed[2] and not needed[1]:
        dw = torch.zeros_like(weight, dtype=exact)
    return dx.contiguous(), dw.contiguous(), db


def _batch_norm(call: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, residual, relu, eps = call
    exact = torch.promote_types(x.dtype, torch.float32)
    out, means, variances = [], [], []
    for m in range(len(x)):
        value = x[m].flatten(0, 2).to(exact)
        mean = value.mean(0)
        value = value - mean
        var = value.square().mean(0)
        value = value / (var + eps).sqrt()
        if weight is not None:
            value = value * weight[m]
        if bias is not None:
            value = value + bias[m]
        if residual is not None:
            value = value + residual[m].flatten(0, 2)
        out.append(value.relu() if relu else value)
        means.append(mean)
        variances.append(var)
    return torch.stack(out).view(x.shape).to(x.dtype), torch.stack(means), torch.stack(variances)


def _batch_norm_backward(call: BatchNormGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``w r (g - mean(g) - n mean(g n))`` with ``n = (x - mean) r``, ``r = 1 / sqrt(var + eps)``."""
    grad, x, y, weight, mean, var, relu, residual, eps = call
    exact = torch.promote_types(x.dtype, torch.float32)
    out, weights, biases, passed = [], [], [], []
    for m in range(len(x)):
        g = grad[m].flatten(0, 2).to(exact)
        if relu:
            g = torch.where(y[m].flatten(0, 2) <= 0, 0, g)
        inverse = (var[m] + eps).rsqrt()
        n = (x[m].flatten(0, 2).to(exact) - mean[m]) * inverse
        weights.append((g * n).sum(0))
        biases.append(g.sum(0))
        value = g - biases[m] / len(g) - n * (weights[m] / len(g))
        out.append(value * (inverse if weight is None else inverse * weight[m]))
        passed.append(g)
    passed = torch.stack(passed).view(x.shape).to(x.dtype) if residual else x.new_empty(0)
    return torch.stack(out).view(x.shape).to(x.dtype), torch.stack(weights), torch.stack(biases), passed


differentiable("model_batch_norm", "reference", Differentiable(_batch_norm, _batch_norm_backward), refuses=never)


@kernel("model_sgd", "reference", refuses=never)
def model_sgd(call: Sgd) -> None:
    models, start = len(call.rate), 0
    rate, momentum = call.rate[:, None], call.momentum[:, None]
    moves = rate != 0
    for size, decay in zip(call.sizes, call.decays, strict=True):
        w, v, g = (each[start : start + models * size].view(models, size) for each in call[:3])
        g = g + decay * w if decay else g
        faster = momentum * v + g
        v.copy_(torch.where(moves, faster, v))
        w.copy_(torch.where(moves, w - rate * (g + momentum * faster), w))
        start += models * size
