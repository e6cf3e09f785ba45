"""Attention with heads of few channels, read from and written to the layout of the linear layers around it."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import AttentionCall
from kr_fast.backends.registry import Differentiable
from kr_fast.ops import _check
from kr_fast.ops._library import call, define, save, saved

_OP = "qkv_attention"


def _kernels(qkv: Tensor, heads: int) -> Differentiable:
    return registry.resolve(_OP, AttentionCall(qkv.device.type, qkv.dtype, qkv.shape[2] // 3 // heads))


def _fake(qkv, heads):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def _forward_fake(qkv, heads):
    exact = torch.promote_types(qkv.dtype, torch.float32)
    return _fake(qkv, heads), qkv.new_empty(qkv.shape[0], heads, qkv.shape[1], dtype=exact)


def _setup_context(ctx, inputs, output):
    qkv, ctx.heads = inputs
    save(ctx, qkv)


def _recomputing_backward(ctx, grad_out):
    """Of the op that keeps nothing, in a graph that was recorded without a gradient."""
    (qkv,) = saved(ctx)
    out, logsumexp = torch.ops.kr_fast.qkv_attention_forward(qkv, ctx.heads)
    return _gradient(grad_out, qkv, out, logsumexp, ctx.heads), None


def _forward_setup_context(ctx, inputs, output):
    qkv, ctx.heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save(ctx, qkv, *output)


def _forward_backward(ctx, grad_out, _):
    return None if grad_out is None else _gradient(grad_out, *saved(ctx), ctx.heads), None


def _gradient(grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, heads: int) -> Tensor:
    return torch.ops.kr_fast.qkv_attention_backward(grad_out.contiguous(), qkv, out, logsumexp, heads)


def _backward_fake(grad_out, qkv, out, logsumexp, heads):
    return torch.empty_like(qkv)


@define(
    "qkv_attention(Tensor qkv, int heads) -> Tensor",
    fake=_fake,
    backward=_recomputing_backward,
    setup_context=_setup_context,
)
def _impl(qkv, heads):
    return _kernels(qkv, heads).forward(qkv, heads, logsumexp=False)[0]


@define(
    "qkv_attention_forward(Tensor qkv, int heads) -> (Tensor, Tensor)",
    fake=_forward_fake,
    backward=_forward_backward,
    setup_context=_forward_setup_context,
)
def _forward(qkv, heads):
    return _kernels(qkv, heads).forward(qkv, heads, logsumexp=True)


@define(
    "qkv_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor logsumexp, int heads) -> Tensor",
    fake=_backward_fake,
)
def _backward(grad_out, qkv, out, logsumexp, heads):
    return _kernels(qkv, heads).backward(grad_out, qkv, out, logsumexp, heads)


def qkv_attention(qkv: Tensor, heads: int) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of each head, with q, k and v side by side in one tensor.

    ``out[n, t, h] = sum_s p[t, s] v[n, s, h]``, ``p = softmax_s(q[n, t, h] . k[n, s, h] / sqrt(d))``, in float32. No
    transposed copy of q, k, v or the output is made. The compiled kernel is for heads of 8, 16, 32 or 64 channels and
    the sequences of small images.

    Once differentiable: where ``qkv`` requires grad, the logsumexp of each row of scores is kept, and one kernel
    computes the weights again and writes the gradient in ``qkv``'s layout and dtype, summed in float32. A second
    derivative is refused.

    Args:
        qkv: ``[N, T, 3 * heads * d]`` contiguous, all of q before all of k before all of v, as one linear layer with
            stacked weights writes them; float32, bfloat16 or float16 (float64 on the reference backend).
        heads: number of heads; ``d`` is what is left.
    Returns: ``[N, T, heads * d]``, contiguous, of ``qkv``'s dtype.
    Raises: TypeError or ValueError naming the argument.
    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; the softmax by tiles: Milakov and Gimelshein,
        "Online normalizer calculation for softmax", 2018, algorithm 3; the gradient: Dao, "FlashAttention-2", 2023,
        algorithm 2.
    """
    _check.tensor(_OP, "qkv", qkv, ndim=3, dtypes=_check.FLOATING)
    heads = _check.integer(_OP, "heads", heads, 1, 2**31)
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
        _check.fail(_OP, "qkv", f"have 3 * {heads} heads * d channels", qkv)
    _check.contiguous(_OP, "qkv", qkv)
    if qkv.requires_grad and torch.is_grad_enabled():
        return torch.ops.kr_fast.qkv_attention_forward(qkv, heads)[0]
    return call(torch.ops.kr_fast.qkv_attention.default, qkv, heads)
