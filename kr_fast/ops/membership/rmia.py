"""Robust membership inference by rank: relative likelihood ratios against a population."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.backends.codes import PREDICATES
from kr_fast.ops import _check
from kr_fast.ops._library import without_backward
from kr_fast.runtime.inputs import as_tensor

LARGEST_LOG = 1000.0  # beyond every finite double


def rmia(p_x: Tensor, p_z: Tensor, *, gamma: float = 1.0, predicate: str = "ratio") -> tuple[Tensor, Tensor]:
    """(fraction [N], log ratio [N]), float64: the share of z that x dominates, and a tie breaker.

    One query: the fraction of z with ``p_x / p_z >= gamma``, the division rounded in the inputs' dtype: the counts of
    the outer product, without it. ``0 / 0`` and ``inf / inf`` do not count. Many x share a fraction (there are only
    Z + 1 of them), most of all at 1; ``ln p_x`` orders them as more z would.
    Several queries: the fraction of z for which a strict majority of the queries has ``p_x / p_z >= gamma``, and the
    mean of ``ln p_x``, cut to +-1000 so that a 0 and an infinity have a mean.

    Tensors, numpy arrays and lists are taken.

    Args:
        p_x: ``[N]`` or ``[A, N]``, ``Pr(x | target) / Pr(x)`` >= 0, float32 or float64; inf allowed, NaN refused.
        p_z: ``[Z]`` or ``[A, Z]``, the same of population examples that are no members; the dtype of ``p_x``.
        gamma: > 0.
        predicate: when x dominates z. "ratio" as above; "ratio_strict" ``p_x / p_z > gamma``, as Privacy Meter 2 has
            it; "reciprocal" ``p_x * (1 / p_z) > gamma``, both operations rounded, as the code published with the paper
            has it. They differ where a ratio is equal to gamma or within a rounding of it.
    Returns: both on p_x's device.
    Raises: TypeError or ValueError naming the argument.
    Source: Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024.
    """
    op = "rmia"
    p_x, p_z = as_tensor(op, "p_x", p_x), as_tensor(op, "p_z", p_z)
    _check.past_dispatcher(op, p_x=p_x, p_z=p_z)
    for name, value in (("p_x", p_x), ("p_z", p_z)):
        _check.tensor(op, name, value, dtypes=(torch.float32, torch.float64))
        if value.ndim not in (1, 2):
            _check.fail(op, name, "have 1 or 2 dimensions", value)
        if bool(torch.isnan(value).any()):
            _check.fail(op, name, "not hold NaN", f"{int(torch.isnan(value).sum())} NaN")
        if bool((value < 0).any()):
            _check.fail(op, name, "be >= 0 (ratios, not their logarithms)", float(value.min()))
    if p_z.dtype != p_x.dtype:
        _check.fail(op, "p_z", f"have the dtype of p_x, {p_x.dtype}", p_z, TypeError)
    if p_z.shape[:-1] != p_x.shape[:-1]:
        _check.fail(op, "p_z", f"have the queries of p_x, {list(p_x.shape[:-1])}", p_z)
    if p_z.shape[-1] == 0 or p_z.shape[-1] >= 2**31:
        _check.fail(op, "p_z", "hold 1 to 2^31 - 1 examples", p_z)
    if p_x.ndim == 2 and not 1 <= len(p_x) < 2**15:
        _check.fail(op, "p_x", "hold 1 to 32767 queries", p_x)
    if not 0 < gamma < float("inf"):
        _check.fail(op, "gamma", "be positive and finite", gamma)
    if predicate not in PREDICATES:
        _check.fail(op, "predicate", f"be one of {', '.join(PREDICATES)}", predicate)
    device = registry.device_for(op, p_x.device, Call(p_x.device.type, p_x.dtype))
    # -0 divides to -inf: one zero, as everywhere else.
    x, z = ((value.to(device) + 0.0).contiguous() for value in (p_x, p_z))
    run = registry.resolve(op, Call(device.type, p_x.dtype))
    count = run(x, z, float(torch.tensor(gamma, dtype=p_x.dtype)), predicate).to(p_x.device)
    log_ratio = p_x.double().log()
    if log_ratio.ndim == 2:
        log_ratio = log_ratio.clamp(-LARGEST_LOG, LARGEST_LOG).mean(0)
    return without_backward(op, count.double() / z.shape[-1], p_x, p_z), log_ratio
