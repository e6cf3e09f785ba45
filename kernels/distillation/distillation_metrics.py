"""Triton kernel of distillation_metrics: two sets of logits in, seven numbers a row out.

Up to ``MAX_BLOCK`` classes both rows stay in registers and are read once; above that a second sweep, which mostly hits
the L2 cache, sums the divergence. The layout is that of the loss.
"""

import torch
import triton
import triton.language as tl
from kr_fast.kernels.distillation.distillation_loss import _kl_terms, _read, _rows_and_mask, alignment
from kr_fast.kernels.distillation.distillation_loss import tile as loss_tile


@triton.jit
def _scaled(x, top, inverse_t):
    """e^((x - top) / T), 0 for a class that is ruled out."""
    return tl.where(x == float("-inf"), 0.0, tl.exp((x - top[:, None]) * inverse_t))


@triton.jit
def _moved(old, new, inverse_t):
    """What sums of e^((x - old) / T) are multiplied by when the row max becomes ``new``."""
    return tl.where(old == float("-inf"), 0.0, tl.exp((old - new) * inverse_t))


@triton.jit
def _top(x, columns, top, first, C: tl.constexpr):
    """Row max and the lowest class that holds it, after one more block of classes."""
    here = tl.max(x, axis=1)
    column = tl.min(tl.where(x == here[:, None], columns[None, :], C), axis=1)
    return tl.maximum(top, here), tl.where(here > top, column, first)


@triton.jit
def metrics_kernel(
    input, target, labels, kl, agreement, teacher_confidence, teacher_entropy, cross_entropy, student_correct,
    teacher_correct,
    n, input_stride, target_stride, temperature, ignore_index,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_LABELS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    rows, live = _rows_and_mask(n, ROWS)
    inverse_t = 1.0 / temperature
    minus_inf = float("-inf")
    top_s = tl.full([ROWS], minus_inf, tl.float32)
    top_t = tl.full([ROWS], minus_inf, tl.float32)
    first_s = tl.zeros([ROWS], tl.int32)
    first_t = tl.zeros([ROWS], tl.int32)
    sum_s = tl.zeros([ROWS], tl.float32)
    sum_1 = tl.zeros([ROWS], tl.float32)
    sum_t = tl.zeros([ROWS], tl.float32)
    sum_t1 = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)  # sum of e^(t - max) (t - max)
    divergence = tl.zeros([ROWS], tl.float32)
    if C <= BLOCK:
        columns = tl.arange(0, BLOCK)
        mask = live[:, None] & (columns < C)[None, :]
        s = _read(input, rows, input_stride, columns, mask, minus_inf, ALIGN)
        t = _read(target, rows, target_stride, columns, mask, minus_inf, ALIGN)
        top_s, first_s = _top(s, columns, top_s, first_s, C)
        top_t, first_t = _top(t, columns, top_t, first_t, C)
        e_s = _scaled(s, top_s, inverse_t)
        e_t = _scaled(t, top_t, inverse_t)
        sum_s = tl.sum(e_s, axis=1)
        sum_t = tl.sum(e_t, axis=1)
        if HAS_LABELS:
            sum_1 = tl.sum(_scaled(s, top_s, 1.0), axis=1)
        e_t1 = _scaled(t, top_t, 1.0)
        sum_t1 = tl.sum(e_t1, axis=1)
        weighted = tl.sum(tl.where(e_t1 == 0.0, 0.0, e_t1 * (t - top_t[:, None])), axis=1)
        shift = tl.log(sum_t / sum_s)
        d = ((t - top_t[:, None]) - (s - top_s[:, None])) * inverse_t - shift[:, None]
        terms = _kl_terms(e_t / sum_t[:, None], e_s / sum_s[:, None], d)
        divergence = tl.sum(tl.where(mask, terms, 0.0), axis=1)
    else:
        for start in tl.range(0, C, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = live[:, None] & (columns < C)[None, :]
            s = _read(input, rows, input_stride, columns, mask, minus_inf, ALIGN)
            t = _read(target, rows, target_stride, columns, mask, minus_inf, ALIGN)
            old_s = top_s
            old_t = top_t
            top_s, first_s = _top(s, columns, top_s, first_s, C)
            top_t, first_t = _top(t, columns, top_t, first_t, C)
            sum_s = sum_s * _moved(old_s, top_s, inverse_t) + tl.sum(_scaled(s, top_s, inverse_t), axis=1)
            sum_t = sum_t * _moved(old_t, top_t, inverse_t) + tl.sum(_scaled(t, top_t, inverse_t), axis=1)
            if HAS_LABELS:
                sum_1 = sum_1 * _moved(old_s, top_s, 1.0) + tl.sum(_scaled(s, top_s, 1.0), axis=1)
            # sum e^(t - new) (t - new) = e^(old - new) (sum e^(t - old) (t - old) + (old - new) sum e^(t - old))
            moved = _moved(old_t, top_t, 1.0)
            further = tl.where(moved == 0.0, 0.0, old_t - top_t)
            e_t1 = _scaled(t, top_t, 1.0)
            add = tl.sum(tl.where(e_t1 == 0.0, 0.0, e_t1 * (t - top_t[:, None])), axis=1)
            weighted = moved * (weighted + further * sum_t1) + add
            sum_t1 = sum_t1 * moved + tl.sum(e_t1, axis=1)
        shift = tl.log(sum_t / sum_s)
        scale_s = 1.0 / sum_s
        scale_t = 1.0 / sum_t
        for start in tl.range(0, C, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = live[:, None] & (columns < C)[None, :]
            s = _read(input, rows, input_stride, columns, mask, minus_inf, ALIGN)
            t = _read(target, rows, target_stride, columns, mask, minus_inf, ALIGN)
            d = ((t - top_t[:, None]) - (s - top_s[:, None])) * inverse_t - shift[:, None]
            p = _scaled(t, top_t, inverse_t) * scale_t[:, None]
            q = _scaled(s, top_s, inverse_t) * scale_s[:, None]
            divergence += tl.sum(tl.where(mask, _kl_terms(p, q, d), 0.0), axis=1)
    tl.store(kl + rows, temperature * temperature * divergence, mask=live)
    tl.store(agreement + rows, first_s == first_t, mask=live)
    tl.store(teacher_confidence + rows, 1.0 / sum_t1, mask=live)
    tl.store(teacher_entropy + rows, tl.log(sum_t1) - weighted / sum_t1, mask=live)
    if HAS_LABELS:
        label = tl.load(labels + rows, mask=live, other=-1)
        ignored = label == ignore_index
        counts = live & (label >= 0) & (label < C) & ~ignored
        picked = tl.load(input + rows * input_stride + label, mask=counts, other=0.0).to(tl.float32)
        # A label outside [0, C) is a caller's bug; on a device it cannot raise, so it poisons the row, as in the loss.
        uncounted = tl.where(ignored, 0.0, float("nan"))
        tl.store(cross_entropy + rows, tl.where(counts, tl.log(sum_1) - (picked - top_s), uncounted), mask=live)
        tl.store(student_correct + rows, counts & (first_s == label), mask=live)
        tl.store(teacher_correct + rows, counts & (first_t == label), mask=live)


def tile(classes: int) -> tuple[int, int, int]:
    """(rows, classes, warps) of a program: half the rows of the loss, for the registers of its seven sums."""
    rows, block, warps = loss_tile(classes)
    return max(1, rows // 2), block, warps


def metrics(input, target, labels, temperature: float, ignore_index: int, outputs: list[torch.Tensor]) -> None:
    """Fill the outputs, in the order of ``kr_fast.ops.distillation.distillation_metrics``: 4, or 7 with labels."""
    n, classes = input.shape
    if n == 0:
        return
    rows, block, warps = tile(classes)
    constants = {"C": classes, "ROWS": rows, "BLOCK": block, "HAS_LABELS": labels is not None}
    constants |= {"ALIGN": alignment(input.stride(0), target.stride(0)), "num_warps": warps, "enable_fp_fusion": True}
    arguments = *outputs, *[None] * (7 - len(outputs)), n, input.stride(0), target.stride(0), temperature, ignore_index
    metrics_kernel[(triton.cdiv(n, rows),)](input, target, labels, *arguments, **constants)
