"""Residual blocks that tests of model_residual_block draw, and their formula in float64."""

import torch
import torch.nn.functional as F


def draw(channels, height, width, images, dtype, models=2, seed=0):
    """x, weight1, bias1, weight2, bias2 and (scale, shift), of sums around 1."""
    generator = torch.Generator().manual_seed(seed + channels + height)
    made = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(models, images, height, width, channels, **made)
    weights = [torch.randn(models, channels, 3, 3, channels, **made) / (9 * channels) ** 0.5 for _ in range(2)]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    biases = [torch.randn(models, channels, **made).to(exact) for _ in range(4)]
    inputs = [x.to(dtype), weights[0].to(dtype), biases[0], weights[1].to(dtype), biases[1]]
    return inputs, {"scale": biases[2], "shift": biases[3]}


def by_hand(x, weight1, bias1, weight2, bias2, scale=None, shift=None, relu=True, between=lambda h: h):
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
