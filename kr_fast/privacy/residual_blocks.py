"""Residual blocks of this package's classifiers in a private step: one autograd function each.

The shortcut takes every other pixel, whose gradient autograd writes among zeros in NCHW: what follows then reads two
layouts. Here it is added where it belongs, and ReLU and the sum overwrite what the norms made.
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


def _convolved(pair: Pair, x: Tensor) -> list[Tensor]:
    """The norm of the convolution, and what its gradients need."""
    conv, norm = pair
    u = nhwc(conv.forward(x)[0])
    y, mean, rstd = norm.fused(u, None, False)
    return [y, x, u, mean, rstd]


def _gradient(pair: Pair, grad: Tensor, kept: list[Tensor], needed: bool = True) -> Any:
    """The gradient by ``x`` from what was ``kept``, which is freed; the layers keep what they need."""
    conv, norm = pair
    x, *of_norm = kept
    kept.clear()
    by_u = norm.fused_backward(grad, (of_norm[0], None, None, *of_norm[1:]), False)[0]
    of_norm.clear()
    conv.record(by_u, x)
    return nhwc(conv.signal(by_u, x)) if needed else None


def _run(pairs: list[Pair], stride: int, x: Tensor) -> list[Any]:
    """y, and what the gradients of each pair need."""
    h, *first = _convolved(pairs[0], x)
    y, *second = _convolved(pairs[1], h.relu_())
    if len(pairs) == 2:
        return [y.add_(x).relu_(), first, second]
    around, *third = _convolved(pairs[2], nhwc(x[:, :, ::stride, ::stride]))
    return [y.add_(around).relu_(), first, second, third]


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
        (y,) = ctx.saved_tensors
        first, second, *third = ctx.kept
        needed = ctx.needs_input_grad[3]
        relu = torch.ops.aten.threshold_backward
        grad, h = relu(nhwc(grad), y, 0), second[0]
        by_h = _gradient(ctx.pairs[1], grad, second)
        relu.grad_input(by_h, h, 0, grad_input=by_h)
        del h
        by_x = _gradient(ctx.pairs[0], by_h, first, needed)
        if third:
            around = _gradient(ctx.pairs[2], grad, third[0], needed)
            if needed:
                by_x[:, :, :: ctx.stride, :: ctx.stride] += around
        elif needed:
            by_x += grad
        return None, None, None, by_x
