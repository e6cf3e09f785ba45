"""Gradients of :func:`kr_fast.ops.batched.model_conv2d.model_conv2d`.

``y = x * weight + bias`` (cross-correlation), so with ``g`` the gradient of ``y``, for each model on its own:
``dx[n, s i + d u - p, s j + d v - p, c] += g[n, i, j, o] weight[o, u, v, c]``,
``dw[o, u, v, c] = sum_{n, i, j} g[n, i, j, o] x[n, s i + d u - p, s j + d v - p, c]``, ``db[o] = sum_{n, i, j} g``.

Sums are float32 (float64 for float64) in an order that follows from one model's shapes, so that the gradients have
the same bits whatever models stand beside it (on the reference backend on a GPU: as far as cuDNN keeps its promise to
be deterministic). ``dx`` has ``x``'s dtype. ``weight`` may be float32 for ``x`` in half precision: it is rounded for
the products, and its gradient stays float32.
"""

import torch

from kr_fast.backends import registry
from kr_fast.backends.arguments import ConvOptions
from kr_fast.backends.calls import ConvCall
from kr_fast.ops._library import define, save, saved

_OP = "model_conv2d_backward"


def _fake(grad, x, weight, stride, padding, dilation, groups, needed):
    exact = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x) if needed[0] else x.new_empty(0),
        torch.empty_like(weight, dtype=exact) if needed[1] or needed[2] else x.new_empty(0, dtype=exact),
        x.new_empty(weight.shape[:2] if needed[2] else (0,), dtype=exact),
    )


@define(
    "model_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool[] needed) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)
def _impl(grad, x, weight, stride, padding, dilation, groups, needed):
    options = ConvOptions(tuple(stride), tuple(padding), tuple(dilation), groups)
    run = registry.resolve(_OP, ConvCall(x.device.type, x.dtype, options.kind(x.shape[4])))
    return run(grad, x, weight, options, tuple(needed))


def setup_context(ctx, inputs, output) -> None:
    """Of the op ``model_conv2d``; what follows the sum, and a view, have no backward."""
    x, weight, bias, residual, rows, _, _, _, *geometry, activation, _, _, _ = inputs
    ctx.given = {"residual": residual is not None, "view": rows is not None, "activation": bool(activation)}
    ctx.geometry, ctx.bias = geometry, None if bias is None else bias.dtype
    save(ctx, x, weight)


def backward(ctx, grad):
    """Of the op ``model_conv2d``."""
    x, weight = saved(ctx)
    for name, given in ctx.given.items():
        if given:
            raise RuntimeError(f"model_conv2d: {name} must be None where a gradient is requested")
    needed = list(ctx.needs_input_grad[:3])
    if x.shape[0] != weight.shape[0]:
        raise RuntimeError(f"model_conv2d: x must hold {weight.shape[0]} models where a gradient is requested")
    weights = weight.to(x.dtype)
    dx, dw, db = torch.ops.kr_fast.model_conv2d_backward(grad.contiguous(), x, weights, *ctx.geometry, needed)
    return (
        dx if needed[0] else None,
        dw.to(weight.dtype) if needed[1] else None,
        db.to(ctx.bias) if needed[2] else None,
        *[None] * 13,
    )
