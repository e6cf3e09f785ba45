"""Residual blocks of this package's classifiers in a private step: one autograd function each.

The shortcut takes every other pixel, whose gradient autograd writes among zeros in NCHW: what follows then reads two
layouts. Here it is added where it belongs. ReLU and the sum are part of the norms, and the gradient that passes by the
block is added by the convolution that makes the other.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kr_fast.models.resnet import Block
from kr_fast.privacy.layers import Conv2d, Layer
from kr_fast.privacy.norms import GroupNorm
from kr_fast.training.conditions import hooked, plain
from kr_fast.training.layout import nhwc
from kr_fast.training.patches import Patches

Pair = tuple[Conv2d, GroupNorm]


def fuse(patches: Patches, model: nn.Module, layers: Iterable[Layer]) -> None:
    """Patch the blocks in ``model`` whose convolutions and norms all are ``layers``."""
    by_module = {id(layer.module): layer for layer in layers}
    for block in model.modules():
        if type(block) is not Block or "forward" in vars(block):
            continue
        modules = [block.conv1, block.bn1, block.conv2, block.bn2]
        modules += [] if isinstance(block.shortcut, nn.Identity) else list(block.shortcut)
        found = [by_module.get(id(each)) for each in modules]
        if all(isinstance(each, kind) for each, kind in zip(found, (Conv2d, GroupNorm) * 3, strict=False)):
            pairs = list(zip(found[::2], found[1::2], strict=True))
            patches.forward(block, functools.partial(_block, pairs))


def _block(pairs: list[Pair], block: Any, x: Tensor) -> Tensor:
    if not plain(x) or not GroupNorm.fuses(x) or hooked(*(each for each in block.modules() if each is not block)):
        return Block.forward(block, x)
    if torch.is_grad_enabled():
        return _Residual.apply(pairs, block.stride, pairs[0][0].anchor, x)
    return _run(pairs, block.stride, nhwc(x))[0]


def _gradient(pair: Pair, by_u: Tensor, x: Tensor, needed: bool = True, residual: Tensor | None = None) -> Any:
    """The gradient by ``x``, and ``residual`` added to it; the layers keep what they need."""
    conv, _ = pair
    conv.record(by_u, x)
    return nhwc(conv.signal(by_u, x, residual)) if needed else None


def _run(pairs: list[Pair], stride: int, x: Tensor) -> list[Any]:
    """y, and what the gradients of each pair need: what its convolution read and made, and the norm's statistics."""
    around, third = x, []
    if len(pairs) == 3:
        conv, norm = pairs[2]
        read = nhwc(x[:, :, ::stride, ::stride])
        u = nhwc(conv.forward(read)[0])
        around, *statistics = norm.fused(u, None, False)
        third = [[read, u, *statistics]]
    kept = []
    for (conv, norm), residual in zip(pairs[:2], (None, around), strict=True):
        u = nhwc(conv.forward(x)[0])
        y, *statistics = norm.fused_relu(u, residual)
        kept.append([x, u, *statistics])
        x = y
    return [x, *kept, *third]


class _Residual(torch.autograd.Function):
    """A call of a block."""

    @staticmethod
    def forward(ctx: Any, pairs: list[Pair], stride: int, anchor: Tensor, x: Tensor) -> Tensor:
        y, *ctx.kept = _run(pairs, stride, nhwc(x))  # not saved as tensors, which would live as long as the call
        ctx.pairs, ctx.stride = pairs, stride
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), (first, second, *third) = ctx.saved_tensors, ctx.kept
        ctx.kept = None
        (pair1, pair2, *pair3), needed = ctx.pairs, ctx.needs_input_grad[3]
        h, *of_norm = second
        second.clear()
        by_u, passed = pair2[1].fused_relu_backward(nhwc(grad), y, of_norm, needed or bool(third))
        del grad, of_norm
        by_h = _gradient(pair2, by_u, h)
        x, *of_norm = first
        first.clear()
        by_u, _ = pair1[1].fused_relu_backward(by_h, h, of_norm, False)
        del h, by_h, of_norm
        by_x = _gradient(pair1, by_u, x, needed, None if third else passed)
        if third:
            read, u, mean, rstd = third.pop()
            by_u = pair3[0][1].fused_backward(passed, (u, None, None, mean, rstd), False)[0]
            around = _gradient(pair3[0], by_u, read, needed)
            if needed:
                by_x[:, :, :: ctx.stride, :: ctx.stride] += around
        return None, None, None, by_x
