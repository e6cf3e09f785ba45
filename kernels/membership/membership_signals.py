"""Triton kernel of membership_signals: the formulas of the CUDA kernel of that name, a tile of rows per program.

Up to ``MAX_BLOCK`` classes a row stays in registers and is read once; above that it is swept three times, of which the
later ones mostly hit the L2 cache.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.distillation.distillation_loss import MAX_BLOCK, _read, _rows_and_mask, alignment
from kr_fast.kernels.distillation.distillation_loss import tile as loss_tile


@triton.jit
def _top_two(z, columns, top, first, second, C: tl.constexpr):
    """Largest logit, lowest class that holds it, and largest of the other classes, after one more block of classes."""
    here = tl.max(z, axis=1)
    column = tl.min(tl.where(z == here[:, None], columns[None, :], C), axis=1)
    runner = tl.max(tl.where(columns[None, :] == column[:, None], float("-inf"), z), axis=1)
    second = tl.maximum(tl.maximum(second, runner), tl.minimum(top, here))
    return tl.maximum(top, here), tl.where(here > top, column, first), second


@triton.jit
def _weights(z, columns, base, first):
    """(z - base, e^(z - base)), the latter 0 for the first of the largest and for classes that are ruled out."""
    shifted = z - base[:, None]
    return shifted, tl.where((columns[None, :] == first[:, None]) | (z == float("-inf")), 0.0, tl.exp(shifted))


@triton.jit
def _sums(z, columns, base, first, label):
    """Sums over the classes but the first: of w, of w but the label's, of w (z - base)."""
    shifted, w = _weights(z, columns, base, first)
    unlike = tl.sum(tl.where(columns[None, :] == label[:, None], 0.0, w), axis=1)
    return tl.sum(w, axis=1), unlike, tl.sum(tl.where(w == 0.0, 0.0, w * shifted), axis=1)


@triton.jit
def _terms(z, columns, base, first, label, k, total, inverse):
    """Sum of -p ln(1 - p) over the classes that are neither the first nor the label: p is at most 1/2."""
    _, w = _weights(z, columns, base, first)
    e = w * k[:, None]
    each = -e * inverse[:, None] * tl.log((total[:, None] - e) * inverse[:, None])
    return tl.sum(tl.where(columns[None, :] == label[:, None], 0.0, each), axis=1)


@triton.jit
def signals_kernel(
    logits, labels, phi, loss, entropy, modified_entropy, confidence, correct, n, stride,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PHI: tl.constexpr, LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, MODIFIED: tl.constexpr, CONFIDENCE: tl.constexpr, CORRECT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    rows, live = _rows_and_mask(n, ROWS)
    minus_inf = float("-inf")
    label = tl.load(labels + rows, mask=live, other=0)
    z_y = tl.load(logits + rows * stride + label, mask=live, other=0.0).to(tl.float32)
    top = tl.full([ROWS], minus_inf, tl.float32)
    second = tl.full([ROWS], minus_inf, tl.float32)
    first = tl.zeros([ROWS], tl.int32)
    rest = tl.zeros([ROWS], tl.float32)
    unlike = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    terms = tl.zeros([ROWS], tl.float32)
    columns = tl.arange(0, BLOCK)
    if C <= BLOCK:
        mask = live[:, None] & (columns < C)[None, :]
        z = _read(logits, rows, stride, columns, mask, minus_inf, ALIGN)
        top, first, second = _top_two(z, columns, top, first, second, C)
        # Where all classes but one are ruled out the scale is that of the top, so that no infinity meets itself.
        base = tl.where(live, tl.where(second == minus_inf, top, second), 0.0)
        rest, unlike, weighted = _sums(z, columns, base, first, label)
    else:
        for start in tl.range(0, C, BLOCK):
            at = start + columns
            mask = live[:, None] & (at < C)[None, :]
            z = _read(logits, rows, stride, at, mask, minus_inf, ALIGN)
            top, first, second = _top_two(z, at, top, first, second, C)
        base = tl.where(live, tl.where(second == minus_inf, top, second), 0.0)
        for start in tl.range(0, C, BLOCK):
            at = start + columns
            mask = live[:, None] & (at < C)[None, :]
            z = _read(logits, rows, stride, at, mask, minus_inf, ALIGN)
            add, add_unlike, add_weighted = _sums(z, at, base, first, label)
            rest += add
            unlike += add_unlike
            weighted += add_weighted
    top = tl.where(live, top, 0.0)
    alone = second == minus_inf
    hit = first == label
    gap = base - top
    k = tl.exp(gap)
    total = k * rest + 1.0
    inverse = 1.0 / total
    log_rest = tl.log(rest)
    # The rivals of a label that is first are summed on the scale of the second, else on that of the first.
    sure = tl.where(alone, float("inf"), z_y - base - log_rest)
    margin = tl.where(hit, sure, z_y - top - tl.log(k * unlike + 1.0))
    # ln(1 + s) as ln(u) s / (u - 1) with u = fl(1 + s), whose rounding cancels.
    s = tl.exp(-tl.abs(margin))
    u = 1.0 + s
    log1p = tl.where(u == 1.0, s, tl.log(u) * s / tl.where(u == 1.0, 1.0, u - 1.0))
    cost = tl.maximum(-margin, 0.0) + log1p
    log_total = tl.log(total)
    if PHI:
        tl.store(phi + rows, margin, mask=live)
    if LOSS:
        tl.store(loss + rows, cost, mask=live)
    if CONFIDENCE:
        tl.store(confidence + rows, tl.exp(-cost), mask=live)
    if CORRECT:
        tl.store(correct + rows, hit.to(tl.float32), mask=live)
    if ENTROPY:
        tl.store(entropy + rows, log_total - k * (gap * rest + weighted) * inverse, mask=live)
    if MODIFIED:
        if C <= BLOCK:
            terms = _terms(z, columns, base, first, label, k, total, inverse)
        else:
            for start in tl.range(0, C, BLOCK):
                at = start + columns
                mask = live[:, None] & (at < C)[None, :]
                z = _read(logits, rows, stride, at, mask, minus_inf, ALIGN)
                terms += _terms(z, at, base, first, label, k, total, inverse)
        complement = tl.where(hit, k * rest * inverse, 1.0 - tl.exp(z_y - top) * inverse)
        own = tl.where(complement == 0.0, 0.0, complement * cost) + terms
        surprise = tl.where(alone, float("inf"), log_total - gap - log_rest)  # -ln(1 - p_first)
        tl.store(modified_entropy + rows, tl.where(hit, own, own + inverse * surprise), mask=live)


def tile(classes: int) -> tuple[int, int, int]:
    """(rows, classes, warps) of a program: those of the loss, but blocks of longer rows would not fit the registers."""
    return loss_tile(min(classes, MAX_BLOCK))


def signals(logits, labels, want: tuple[str, ...]) -> list[torch.Tensor]:
    """Float32 statistics of each row, in the order of ``want``."""
    n, classes = logits.shape
    out = {name: torch.empty(n, dtype=torch.float32, device=logits.device) for name in want}
    if n:
        names = ("phi", "loss", "entropy", "modified_entropy", "confidence", "correct")
        rows, block, warps = tile(classes)
        signals, requested, stride = (
            [out.get(name) for name in names],
            [name in out for name in names],
            logits.stride(0),
        )
        options = {"ALIGN": alignment(stride), "num_warps": warps, "enable_fp_fusion": True}
        launch = signals_kernel[(triton.cdiv(n, rows),)]
        launch(logits, labels, *signals, n, stride, classes, rows, block, *requested, **options)
    return [out[name] for name in want]
