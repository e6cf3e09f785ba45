"""What a graph of stacks needs beside the model-batched ops: order in memory, linear layers, norms, means of pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kr_fast.ops.batched.model_conv2d import model_conv2d


def stacked(value: Tensor, channels_last: bool) -> Tensor:
    """``[M, ...]`` in the order in which a graph wants it."""
    return value.movedim(2, -1).contiguous() if channels_last else value.contiguous()


def unstacked(value: Tensor, channels_last: bool) -> Tensor:
    """The inverse of :func:`stacked`."""
    return value.movedim(-1, 2).contiguous() if channels_last else value


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of one pixel, whose bits do not depend on the number of models as a batched product's might."""
    rows = x.flatten(1, -2)[:, :, None, None].contiguous()
    return model_conv2d(rows, weight[:, :, None, None], bias).view(*x.shape[:-1], weight.shape[1])


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """An image's norm knows neither its batch nor its model; weight and bias ``[M, C]`` do."""
    y = F.group_norm(x.flatten(0, 1), groups, None, None, eps).unflatten(0, x.shape[:2])
    shape = (len(x), 1, x.shape[2], *[1] * (x.ndim - 3))
    return _affine(y, weight, bias, shape)


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last dimensions, which have ``shape``; weight and bias are ``[M, *shape]``."""
    y = F.layer_norm(x, shape, None, None, eps)
    return _affine(y, weight, bias, (len(x), *[1] * (x.ndim - 1 - len(shape)), *shape))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if weight is not None:
        y = y * weight.to(y.dtype).view(shape)
    return y if bias is None else y + bias.to(y.dtype).view(shape)


def pixel_mean(x: Tensor, keep: bool) -> Tensor:
    """The mean over H and W of ``[M, N, C, H, W]``, added in one order whatever M and N are."""
    y = _PixelMean.apply(x)
    return y[..., None, None] if keep else y


class _PixelMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.size = x.shape[3:]
        rest = x.movedim(2, -1).flatten(2, 3).to(torch.promote_types(x.dtype, torch.float32))
        count = rest.shape[2]
        while rest.shape[2] > 1:  # halves, so that the sums are as exact as a tree's
            half = rest.shape[2] // 2
            first = rest[:, :, :half] + rest[:, :, half : 2 * half]
            if rest.shape[2] % 2:
                first[:, :, 0] += rest[:, :, -1]
            rest = first
        return rest[:, :, 0].div(count).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        height, width = ctx.size
        spread = (grad / (height * width))[:, :, None, None].expand(-1, -1, height, width, -1)
        return spread.contiguous().movedim(-1, 2)
