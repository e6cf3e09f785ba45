"""Inputs of the ops over M models, and the formula of a residual block in float64."""

import torch
import torch.nn.functional as F


def batch_norm_inputs(shape=(3, 2, 4, 5, 6), dtype=torch.float64, seed=0, residual=True, affine=True):
    """x, weight, bias and residual of model_batch_norm."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = (normal(*shape) * 2 + 1).to(dtype)
    weight, bias = ((normal(shape[0], shape[4]) + 1).to(exact) for _ in range(2)) if affine else (None, None)
    return x, weight, bias, normal(*shape).to(dtype) if residual else None


def residual_block_inputs(channels, height, width, images, dtype, models=2, seed=0):
    """x, weight1, bias1, weight2, bias2 and (scale, shift), of sums around 1."""
    generator = torch.Generator().manual_seed(seed + channels + height)
    made = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(models, images, height, width, channels, **made)
    weights = [torch.randn(models, channels, 3, 3, channels, **made) / (9 * channels) ** 0.5 for _ in range(2)]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    biases = [torch.randn(models, channels, **made).to(exact) for _ in range(4)]
    inputs = [x.to(dtype), weights[0].to(dtype), biases[0], weights[1].to(dtype), biases[1]]
    return inputs, {"scale": biases[2], "shift": biases[3]}


def residual_block(x, weight1, bias1, weight2, bias2, scale=None, shift=None, relu=True, between=lambda h: h):
    """The docstring's formula in float64; ``between`` is applied to what the layers hand on."""
    found = []
    for m in range(len(x)):
        inner = x[m].double()
        if scale is not None:
            inner = between((inner * scale[m].double() + shift[m].double()).relu())
        for weight, bias in ((weight1, bias1), (weight2, bias2)):
            kernel = weight[m].double().permute(0, 3, 1, 2)
            z = F.conv2d(inner.permute(0, 3, 1, 2), kernel, padding=1).permute(0, 2, 3, 1)
            inner = z if bias is None else z + bias[m].double()
            inner = between(inner.relu()) if weight is weight1 else inner
        y = inner + x[m].double()
        found.append(y.relu() if relu else y)
    return torch.stack(found)
