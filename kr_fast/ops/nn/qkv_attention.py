"""Attention with heads of few channels, read from and written to the layout of the linear layers around it."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import AttentionCall
from kr_fast.ops import _check
from kr_fast.ops._library import call, define

_OP = "qkv_attention"


def _fake(qkv, heads):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@define("qkv_attention(Tensor qkv, int heads) -> Tensor", fake=_fake)
def _impl(qkv, heads):
    return registry.resolve(_OP, AttentionCall(qkv.device.type, qkv.dtype, qkv.shape[2] // 3 // heads))(qkv, heads)


def qkv_attention(qkv: Tensor, heads: int) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of each head, with q, k and v side by side in one tensor.

    ``out[n, t, h] = sum_s p[t, s] v[n, s, h]``, ``p = softmax_s(q[n, t, h] . k[n, s, h] / sqrt(d))``, in float32. No
    transposed copy of q, k, v or the output is made. For inference: there is no backward. The compiled kernel is for
    heads of 8, 16, 32 or 64 channels and the sequences of small images.

    Args:
        qkv: ``[N, T, 3 * heads * d]`` contiguous, all of q before all of k before all of v, as one linear layer with
            stacked weights writes them; float32, bfloat16 or float16 (float64 on the reference backend).
        heads: number of heads; ``d`` is what is left.
    Returns: ``[N, T, heads * d]``, contiguous, of ``qkv``'s dtype.
    Raises: TypeError or ValueError naming the argument; ValueError if ``qkv`` requires grad while grad mode is on.
    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; the softmax by tiles: Milakov and Gimelshein,
        "Online normalizer calculation for softmax", 2018, algorithm 3.
    """
    _check.tensor(_OP, "qkv", qkv, ndim=3, dtypes=_check.FLOATING)
    heads = _check.integer(_OP, "heads", heads, 1, 2**31)
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
        _check.fail(_OP, "qkv", f"have 3 * {heads} heads * d channels", qkv)
    _check.contiguous(_OP, "qkv", qkv)
    _check.no_grad(_OP, qkv=qkv)
    return call(torch.ops.kr_fast.qkv_attention.default, qkv, heads)
