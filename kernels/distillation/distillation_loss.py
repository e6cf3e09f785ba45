"""Triton kernels of the distillation loss: the portable GPU path.

The class count and a divisor of the row strides are compile-time constants, so that loads stay vectorised (with a
run-time count or stride, C = 1000 compiles to one load an element). A program holds a tile of rows x classes and walks
over the classes in blocks of 2,048, or 4,096 where a row has more than 16,384, without spills. Everything is float32
after the load; offsets of rows are 64-bit.
"""

import torch
import triton
import triton.language as tl

# The numbers of kr_fast/backends/codes.py, which a test compares: these kernels import nothing of the package.
LOSS_STATISTICS = 5
TARGET_KINDS = {"logits": 0, "probs": 1, "log_probs": 2, "topk_smooth": 1, "topk_renorm": 1}
DIVERGENCES = {"kl": 0, "cross": 1, "decoupled": 2}
STATS = tl.constexpr(LOSS_STATISTICS)
LOGITS, PROBS, LOG_PROBS = (tl.constexpr(TARGET_KINDS[name]) for name in ("logits", "probs", "log_probs"))
CROSS, DECOUPLED = tl.constexpr(DIVERGENCES["cross"]), tl.constexpr(DIVERGENCES["decoupled"])
MAX_BLOCK = 2048
LONG, LONG_BLOCK = 16_384, 4096  # longer rows: twice as much in flight, and fewer turns of the loop
REDUCE_BLOCK = 4096
TILE = 2048  # elements of each input that a program holds at a time


@triton.jit
def _rows_and_mask(n, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return rows, rows < n


@triton.jit
def _read(base, rows, stride, columns, mask, fill, ALIGN: tl.constexpr):
    """ALIGN, a power of two that divides the stride, is what lets a row of 1,000 be read 16 bytes at a time."""
    offsets = tl.multiple_of(rows * stride, ALIGN)[:, None] + columns[None, :]
    return tl.load(base + offsets, mask=mask, other=fill).to(tl.float32)


@triton.jit
def _online(top, total, x, inverse_t):
    """Row max and sum of e^((x - max) / T) after one more block of classes."""
    new = tl.maximum(top, tl.max(x, axis=1))
    old = tl.where(new == float("-inf"), 0.0, tl.exp((top - new) * inverse_t))
    add = tl.where(x == float("-inf"), 0.0, tl.exp((x - new[:, None]) * inverse_t))
    return new, total * old + tl.sum(add, axis=1)


@triton.jit
def _kl_terms(p, q, d):
    """p (d + expm1(-d)): see kr_fast.ops.distillation.distillation_loss."""
    poly = 1.0 / 720 + d * (-1.0 / 5040 + d * (1.0 / 40320))
    poly = 0.5 + d * (-1.0 / 6 + d * (1.0 / 24 + d * (-1.0 / 120 + d * poly)))
    far = p * d + (q - p)
    far = tl.where(far < 0.0, 0.0, far)  # a maximum would turn NaN into 0
    return tl.where(p == 0.0, q, tl.where(tl.abs(d) < 0.25, p * (d * d) * poly, far))


@triton.jit
def _log_sigmoid(a):
    return tl.minimum(a, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a)))


@triton.jit
def _at_label(base, rows, stride, label, live, C: tl.constexpr):
    """A row's logit at its label, 0 where that is no class."""
    return tl.load(base + rows * stride + label, mask=live & (label >= 0) & (label < C), other=0.0).to(tl.float32)


@triton.jit
def _topk(target, indices, rows, stride, columns, live, C: tl.constexpr, K: tl.constexpr, SMOOTH: tl.constexpr):
    """A block of classes of rows that are stored as K of their probabilities."""
    total = tl.zeros([rows.shape[0]], tl.float32)
    for k in tl.range(0, K):
        total += tl.load(target + rows * stride + k, mask=live, other=1.0 / K).to(tl.float32)
    if SMOOTH:
        rest = tl.maximum(1.0 - total, 0.0) / (C - K if C > K else 1)
        factor = tl.full([rows.shape[0]], 1.0, tl.float32)
    else:
        rest = tl.zeros([rows.shape[0]], tl.float32)
        factor = 1.0 / total
    p = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32) + rest[:, None]
    for k in tl.range(0, K):
        value = tl.load(target + rows * stride + k, mask=live, other=0.0).to(tl.float32) * factor
        index = tl.load(indices + rows * K + k, mask=live, other=0)
        p = tl.where(columns[None, :] == index[:, None], value[:, None], p)
    return p


@triton.jit
def forward_kernel(
    input, target, indices, labels, weight, row_loss, row_weight, stats, n, input_stride, target_stride,
    temperature, alpha, beta, soft, hard, smoothing, ignore_index,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    SMOOTH: tl.constexpr, DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    rows, live = _rows_and_mask(n, ROWS)
    inverse_t = 1.0 / temperature
    minus_inf = float("-inf")
    top = tl.full([ROWS], minus_inf, tl.float32)
    sum_t = tl.zeros([ROWS], tl.float32)
    sum_1 = tl.zeros([ROWS], tl.float32)
    teacher_top = tl.full([ROWS], minus_inf, tl.float32)
    teacher_sum = tl.zeros([ROWS], tl.float32)
    label = tl.load(labels + rows, mask=live, other=0) if HAS_LABELS else tl.zeros([ROWS], tl.int64)
    for start in tl.range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (columns < C)[None, :]
        if DIVERGENCE == DECOUPLED:  # the label is taken out of the rows
            mask = mask & (columns[None, :] != label[:, None])
        s = _read(input, rows, input_stride, columns, mask, minus_inf, ALIGN)
        if HARD:
            _, sum_1 = _online(top, sum_1, s, 1.0)
        top, sum_t = _online(top, sum_t, s, inverse_t)
        if SOFT and KIND == LOGITS:
            t = _read(target, rows, target_stride, columns, mask, minus_inf, ALIGN)
            teacher_top, teacher_sum = _online(teacher_top, teacher_sum, t, inverse_t)
    log_s = tl.log(sum_t)
    log_1 = tl.log(sum_1) if HARD else tl.zeros([ROWS], tl.float32)
    log_t = tl.log(teacher_sum) if SOFT and KIND == LOGITS else tl.zeros([ROWS], tl.float32)
    if not (SOFT and KIND == LOGITS):
        teacher_top = tl.zeros([ROWS], tl.float32)

    kl = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (columns < C)[None, :]
        if DIVERGENCE == DECOUPLED:
            mask = mask & (columns[None, :] != label[:, None])
        s = _read(input, rows, input_stride, columns, mask, minus_inf, ALIGN)
        centred = s - top[:, None]
        if SOFT:
            log_q = centred * inverse_t - log_s[:, None]
            if K > 0:
                t = _topk(target, indices, rows, target_stride, columns, live, C, K, SMOOTH)
            else:
                t = _read(target, rows, target_stride, columns, mask, 0.0 if KIND == PROBS else minus_inf, ALIGN)
            if KIND == LOGITS:
                log_p = (t - teacher_top[:, None]) * inverse_t - log_t[:, None]
                p = tl.exp(log_p)
            elif KIND == LOG_PROBS:
                log_p = t
                p = tl.exp(t)
            else:
                log_p = tl.log(t)
                p = t
            if DIVERGENCE == CROSS:
                terms = tl.where(p == 0.0, 0.0, -p * log_q)
            else:
                terms = _kl_terms(p, tl.exp(log_q), log_p - log_q)
            kl += tl.sum(tl.where(mask, terms, 0.0), axis=1)
        if HARD and DIVERGENCE != DECOUPLED:
            chosen = columns[None, :] == label[:, None]
            picked += tl.sum(tl.where(chosen & mask, centred, 0.0), axis=1) * (1.0 - smoothing)
            if smoothing != 0.0:
                picked += tl.sum(tl.where(mask, centred, 0.0), axis=1) * (smoothing / C)

    if DIVERGENCE == DECOUPLED:
        # The label's logit against the rest, of student and teacher at T and of the student at 1: see dkd_loss.
        z_s = _at_label(input, rows, input_stride, label, live, C) - top
        z_t = _at_label(target, rows, target_stride, label, live, C) - teacher_top
        a_s, a_t, a_1 = z_s * inverse_t - log_s, z_t * inverse_t - log_t, z_s - log_1
        log_q, log_q_rest = _log_sigmoid(a_s), _log_sigmoid(-a_s)
        log_p, log_p_rest = _log_sigmoid(a_t), _log_sigmoid(-a_t)
        two = _kl_terms(tl.exp(log_p), tl.exp(log_q), log_p - log_q)
        two += _kl_terms(tl.exp(log_p_rest), tl.exp(log_q_rest), log_p_rest - log_q_rest)
        kl = alpha * two + beta * kl
    loss = soft * temperature * temperature * kl if SOFT else tl.zeros([ROWS], tl.float32)
    if HARD and DIVERGENCE == DECOUPLED:
        loss += -hard * _log_sigmoid(a_1)
    elif HARD:
        loss += hard * (log_1 - picked)
    if HARD or DIVERGENCE == DECOUPLED:
        # A label outside [0, C) is a caller's bug; on a device it cannot raise, so it poisons the loss.
        loss = tl.where((label < 0) | (label >= C), float("nan"), loss)
    w = tl.load(weight + rows, mask=live, other=0.0).to(tl.float32) if HAS_WEIGHT else tl.full([ROWS], 1.0, tl.float32)
    if HAS_LABELS:
        w = tl.where(label == ignore_index, 0.0, w)
    tl.store(row_loss + rows, tl.where(w == 0.0, 0.0, w * loss), mask=live)
    tl.store(row_weight + rows, w, mask=live)
    tl.store(stats + rows * STATS, top, mask=live)
    tl.store(stats + rows * STATS + 1, log_s, mask=live)
    tl.store(stats + rows * STATS + 2, teacher_top, mask=live)
    tl.store(stats + rows * STATS + 3, log_t, mask=live)
    tl.store(stats + rows * STATS + 4, log_1, mask=live)


@triton.jit
def backward_kernel(
    upstream, input, target, indices, labels, weight, stats, scale, grad,
    n, input_stride, target_stride, upstream_stride, temperature, alpha, beta, soft, hard, smoothing, ignore_index,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    SMOOTH: tl.constexpr, DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    rows, live = _rows_and_mask(n, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = live[:, None] & (columns < C)[None, :]
    inverse_t = 1.0 / temperature
    top = tl.load(stats + rows * STATS, mask=live, other=0.0)
    log_s = tl.load(stats + rows * STATS + 1, mask=live, other=0.0)
    teacher_top = tl.load(stats + rows * STATS + 2, mask=live, other=0.0)
    log_t = tl.load(stats + rows * STATS + 3, mask=live, other=0.0)
    log_1 = tl.load(stats + rows * STATS + 4, mask=live, other=0.0)
    factor = tl.load(upstream + rows * upstream_stride, mask=live, other=0.0).to(tl.float32) * tl.load(scale)
    if HAS_WEIGHT:
        w = tl.load(weight + rows, mask=live, other=0.0).to(tl.float32)
        factor = tl.where(w == 0.0, 0.0, factor * w)  # also under an infinite upstream gradient
    label = tl.load(labels + rows, mask=live, other=0) if HAS_LABELS else tl.zeros([ROWS], tl.int64)
    if HAS_LABELS:
        factor = tl.where(label == ignore_index, 0.0, factor)
    centred = _read(input, rows, input_stride, columns, mask, 0.0, ALIGN) - top[:, None]
    g = tl.zeros([ROWS, BLOCK], tl.float32)
    if SOFT:
        if K > 0:
            p = _topk(target, indices, rows, target_stride, columns, live, C, K, SMOOTH)
        else:
            p = _read(target, rows, target_stride, columns, mask, 0.0, ALIGN)
        if KIND == LOGITS:
            p = tl.exp((p - teacher_top[:, None]) * inverse_t - log_t[:, None])
        elif KIND == LOG_PROBS:
            p = tl.exp(p)
        q = tl.exp(centred * inverse_t - log_s[:, None])
        if DIVERGENCE == DECOUPLED:
            z_s = _at_label(input, rows, input_stride, label, live, C) - top
            z_t = _at_label(target, rows, target_stride, label, live, C) - teacher_top
            a_s, a_t, a_1 = z_s * inverse_t - log_s, z_t * inverse_t - log_t, z_s - log_1
            near_one = tl.exp(_log_sigmoid(-a_t)) - tl.exp(_log_sigmoid(-a_s))
            pull = alpha * tl.where(a_s < 0, tl.exp(_log_sigmoid(a_s)) - tl.exp(_log_sigmoid(a_t)), near_one)
            here = columns[None, :] == label[:, None]
            g = soft * temperature * tl.where(here, pull[:, None], beta * (q - p) - pull[:, None] * q)
            if HARD:
                rest = tl.exp(_log_sigmoid(-a_1))[:, None]
                g += hard * tl.where(here, -rest, rest * tl.exp(centred - log_1[:, None]))
        else:
            g = soft * temperature * (q - p)
    if HARD and DIVERGENCE != DECOUPLED:
        expected = tl.where(columns[None, :] == label[:, None], 1.0 - smoothing, 0.0)
        g += hard * (tl.exp(centred - log_1[:, None]) - expected - smoothing / C)
    g = tl.where(factor[:, None] == 0.0, 0.0, g * factor[:, None])
    tl.store(grad + rows[:, None] * C + columns[None, :], g.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(row_loss, row_weight, loss, scale, n, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The loss over all rows and the factor of their gradients, by one program: the same sum in every run."""
    total = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(row_loss + rows, mask=rows < n, other=0.0)
        if MEAN:
            weights += tl.load(row_weight + rows, mask=rows < n, other=0.0)
    factor = 1.0
    if MEAN:
        weight = tl.sum(weights, axis=0)
        factor = tl.where(weight > 0, 1.0 / weight, 0.0)
    tl.store(loss, tl.sum(total, axis=0) * factor)
    tl.store(scale, factor)


def tile(classes: int) -> tuple[int, int, int]:
    """(rows, classes, warps) of a program."""
    block = min(triton.next_power_of_2(classes), LONG_BLOCK if classes > LONG else MAX_BLOCK)
    rows = max(1, TILE // block // 2)
    return rows, block, 16 if block > MAX_BLOCK else 8 if rows * block >= 2048 else 4


def alignment(*strides: int) -> int:
    """The largest power of two, at most 16, that divides every stride."""
    return min(16, *(stride & -stride or 16 for stride in strides))


def _values(options) -> tuple:
    """Of a kr_fast.backends.arguments.LossOptions, what a kernel takes at run time."""
    weights = options.soft_weight, options.hard_weight, options.label_smoothing
    return options.temperature, options.alpha, options.beta, *weights, options.ignore_index


def _constants(input, target, indices, labels, weight, options) -> dict:
    rows, block, warps = tile(input.shape[1])
    strides = (input.stride(0),) if indices is not None else (input.stride(0), target.stride(0))
    constants = {"C": input.shape[1], "K": 0 if indices is None else indices.shape[1], "ROWS": rows, "BLOCK": block}
    constants |= {"KIND": TARGET_KINDS[options.target_type], "SMOOTH": options.target_type == "topk_smooth"}
    constants |= {"DIVERGENCE": DIVERGENCES[options.divergence], "ALIGN": alignment(*strides)}
    constants |= {"HAS_LABELS": labels is not None, "HAS_WEIGHT": weight is not None}
    constants |= {"SOFT": options.soft_weight != 0, "HARD": options.hard_weight != 0}
    return constants | {"num_warps": warps, "enable_fp_fusion": True}


def forward(input, target, indices, labels, weight, options):
    """(loss, row statistics, factor of the gradients), float32."""
    n = len(input)
    row_loss = torch.empty(n, dtype=torch.float32, device=input.device)
    row_weight, stats = torch.empty_like(row_loss), row_loss.new_empty(n, LOSS_STATISTICS)
    if n:
        constants = _constants(input, target, indices, labels, weight, options)
        tensors = input, target, indices, labels, weight, row_loss, row_weight, stats
        grid = (triton.cdiv(n, constants["ROWS"]),)
        forward_kernel[grid](*tensors, n, input.stride(0), target.stride(0), *_values(options), **constants)
    if options.reduction == "none":
        return row_loss, stats, torch.ones((), device=input.device)
    loss, scale = row_loss.new_empty(()), row_loss.new_empty(())
    constants = {"MEAN": options.reduction == "mean", "BLOCK": REDUCE_BLOCK, "num_warps": 8, "enable_fp_fusion": True}
    reduce_kernel[(1,)](row_loss, row_weight, loss, scale, n, **constants)
    return loss, stats, scale


def backward(upstream, input, target, indices, labels, weight, stats, scale, options):
    """d loss / d input, of input's dtype, contiguous."""
    n, classes = input.shape
    grad = torch.empty(n, classes, dtype=input.dtype, device=input.device)
    if n:
        constants = _constants(input, target, indices, labels, weight, options)
        tensors = upstream, input, target, indices, labels, weight, stats, scale, grad
        strides = input.stride(0), target.stride(0), upstream.stride(0) if upstream.ndim else 0
        grid = triton.cdiv(n, constants["ROWS"]), triton.cdiv(classes, constants["BLOCK"])
        backward_kernel[grid](*tensors, n, *strides, *_values(options), **constants)
    return grad
