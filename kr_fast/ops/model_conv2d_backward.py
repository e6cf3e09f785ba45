"""Gradients of :func:`kr_fast.ops.model_conv2d.model_conv2d`, and the convolution that autograd knows."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.ops import _check
from kr_fast.ops._library import define
from kr_fast.ops.model_conv2d import kind

_OP = "model_conv2d_backward"


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(grad, x, weight, stride, padding, dilation, groups, wanted):
    exact = _exact(x)
    return (
        torch.empty_like(x) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight, dtype=exact) if wanted[1] or wanted[2] else x.new_empty(0, dtype=exact),
        x.new_empty(weight.shape[:2] if wanted[2] else (0,), dtype=exact),
    )


@define(
    "model_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)
def _impl(grad, x, weight, stride, padding, dilation, groups, wanted):
    run = registry.resolve(_OP, x.device.type, x.dtype, kind(groups, x.shape[4]))
    return run(grad, x, weight, tuple(stride), tuple(padding), tuple(dilation), groups, tuple(wanted))


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        own = weight.to(x.dtype)
        shift = None if bias is None else bias.to(_exact(x))
        y = torch.ops.kr_fast.model_conv2d(
            x, own, shift, None, None, None, None, None, stride, padding, dilation, groups, "", [], "", 0
        )
        ctx.save_for_backward(x, own)
        ctx.geometry, ctx.dtypes = (stride, padding, dilation, groups), (weight.dtype, bias is None or bias.dtype)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        dx, dw, db = torch.ops.kr_fast.model_conv2d_backward(grad.contiguous(), x, weight, *ctx.geometry, wanted)
        return (
            dx if wanted[0] else None,
            dw.to(ctx.dtypes[0]) if wanted[1] else None,
            db.to(ctx.dtypes[1]) if wanted[2] else None,
            None, None, None, None,
        )  # fmt: skip


def differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """``model_conv2d`` without epilogue, once differentiable; its caller has checked the arguments.

    ``y = x * weight + bias`` (cross-correlation), so with ``g`` the gradient of ``y``, for each model on its own:
    ``dx[n, s i + d u - p, s j + d v - p, c] += g[n, i, j, o] weight[o, u, v, c]``,
    ``dw[o, u, v, c] = sum_{n, i, j} g[n, i, j, o] x[n, s i + d u - p, s j + d v - p, c]``, ``db[o] = sum_{n, i, j} g``.

    Sums are float32 (float64 for float64) in an order that follows from one model's shapes, so that the gradients have
    the same bits whatever models stand beside them (on the reference backend on a GPU: as far as cuDNN keeps its
    promise to be deterministic). ``dx`` has ``x``'s dtype. ``weight`` may be float32 for ``x`` in half precision: it is
    rounded for the products, and its gradient stays float32.
    """
    if x.shape[0] != weight.shape[0]:
        _check.fail(_OP, "x", f"hold {weight.shape[0]} models where a gradient is wanted", x)
    if x.shape[1:4].numel() >= 2**31:
        _check.fail(_OP, "x", "have fewer than 2^31 pixels a model", x)
    return _Conv2d.apply(x, weight, bias, stride, padding, dilation, groups)
