"""The distillation losses and metrics in plain torch: the definition, and the gradient by formula."""

import math

import torch
from torch import Tensor

from kr_fast.backends.arguments import LossOptions
from kr_fast.backends.codes import public_name
from kr_fast.backends.registry import Differentiable, differentiable, kernel, never
from kr_fast.ops.distillation import checks


def _float(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _log_softmax(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ln softmax(x / T), row max, ln sum); the max, on which nothing depends, is subtracted before the division."""
    top = x.detach().amax(1, keepdim=True)
    scaled = (x - top) / temperature
    log_sum = scaled.exp().sum(1, keepdim=True).log()
    return scaled - log_sum, top, log_sum


def _dense(target: Tensor, indices: Tensor, target_type: str, classes: int) -> Tensor:
    """Top-k probabilities as rows of all classes."""
    total = target.sum(1, keepdim=True)
    if target_type == "topk_renorm":
        return target.new_zeros(len(target), classes).scatter(1, indices, target / total)
    rest = (1 - total).clamp_min(0) / max(classes - target.shape[1], 1)
    return rest.expand(-1, classes).scatter(1, indices, target)


def _teacher(target, indices, classes, temperature, target_type) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, ln p, row max, ln sum), the last two of logits only."""
    if target_type == "logits":
        log_p, top, log_sum = _log_softmax(target, temperature)
        return log_p.exp(), log_p, top, log_sum
    nothing = target.new_zeros(len(target), 1)
    if target_type == "log_probs":
        return target.exp(), target, nothing, nothing
    p = target if indices is None else _dense(target, indices, target_type, classes)
    return p, p.log(), nothing, nothing


def _kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """``p (d + expm1(-d))`` by series near 0; ``q`` where ``p`` is 0."""
    if d.dtype == torch.float64:
        series = d + torch.expm1(-d)
    else:
        series = torch.zeros_like(d)
        for divisor in (40320, -5040, 720, -120, 24, -6, 2):
            series = series * d + 1 / divisor
        series = series * d * d
    near = p * series
    far = (p * d + (q - p)).clamp_min(0)
    return torch.where(p == 0, q, torch.where(d.abs() < 0.25, near, far))


def _decoupled(z: Tensor, t: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(alpha TCKD + beta NCKD by row, its gradient in z / T), see ``kr_fast.ops.distillation.dkd_loss``."""
    temperature, alpha, beta = options.temperature, options.alpha, options.beta
    here = labels.clamp(0, z.shape[1] - 1)[:, None]

    def parts(x):  # ln of the label's probability and of the rest's, and ln of the probabilities within the rest
        rest = x.scatter(1, here, float("-inf"))
        within, top, log_sum = _log_softmax(rest, temperature)
        a = (x.gather(1, here) - top) / temperature - log_sum
        return torch.nn.functional.logsigmoid(a), torch.nn.functional.logsigmoid(-a), within

    (log_q, log_q_rest, log_q_hat), (log_p, log_p_rest, log_p_hat) = parts(z), parts(t)
    q, p, q_hat, p_hat = log_q.exp(), log_p.exp(), log_q_hat.exp(), log_p_hat.exp()
    two = _kl_terms(p, q, log_p - log_q) + _kl_terms(log_p_rest.exp(), log_q_rest.exp(), log_p_rest - log_q_rest)
    value = alpha * two[:, 0] + beta * _kl_terms(p_hat, q_hat, log_p_hat - log_q_hat).sum(1)
    grad = beta * (q_hat - p_hat) - alpha * (q - p) * q_hat
    return value, grad.scatter(1, here, alpha * (q - p))


def row_weight(input: Tensor, labels: Tensor | None, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What each row counts, in the dtype of ``input``."""
    w = input.new_ones(len(input)) if weight is None else weight.to(input.dtype)
    return w if labels is None else torch.where(labels == ignore_index, 0, w)


def forward(input, target, indices, labels, weight, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, row statistics, 1 / W or 1): see ``kr_fast.ops.distillation.distillation_loss``."""
    z, t, temperature = _float(input, input), _float(target, input), options.temperature
    log_q, top, log_sum = _log_softmax(z, temperature)
    _check_classes(z.shape[1], indices, labels, options)
    p, log_p, teacher_top, teacher_sum = _teacher(t, indices, z.shape[1], temperature, options.target_type)
    rows = z.new_zeros(len(z))
    if options.soft_weight:
        if options.divergence == "decoupled":
            terms = _decoupled(z, t, labels, options)[0]
        elif options.divergence == "cross":
            terms = torch.where(p == 0, 0, -p * log_q).sum(1)
        else:
            terms = _kl_terms(p, log_q.exp(), log_p - log_q).sum(1)
        rows = rows + options.soft_weight * temperature**2 * terms
    log_1 = torch.zeros_like(log_sum)
    if options.hard_weight:
        log_q1, _, log_1 = _log_softmax(z, 1.0)
        inside = (labels >= 0) & (labels < z.shape[1])
        picked = log_q1.gather(1, torch.where(inside, labels, 0)[:, None])[:, 0] * (1 - options.label_smoothing)
        if options.label_smoothing:
            picked = picked + options.label_smoothing * log_q1.mean(1)
        rows = rows - options.hard_weight * picked
    w = row_weight(z, labels, weight, options.ignore_index)
    rows = torch.where(w == 0, 0, w * rows)
    total = w.sum()
    scale = torch.where(total > 0, 1 / total, 0) if options.reduction == "mean" else torch.ones_like(total)
    loss = rows if options.reduction == "none" else rows.sum() * scale
    stats = torch.cat([top, log_sum, teacher_top, teacher_sum, log_1], dim=1)
    return loss, stats if z.is_cuda else stats[:0], scale


def _check_classes(classes: int, indices: Tensor | None, labels: Tensor | None, options: LossOptions) -> None:
    op = public_name(options.target_type, options.divergence)
    if indices is not None and bool(((indices < 0) | (indices >= classes)).any()):
        raise ValueError(f"{op}: indices must be in [0, {classes})")
    if options.hard_weight or options.divergence == "decoupled":
        checks.classes_of(op, labels, classes, options.ignore_index)


def backward(upstream, input, target, indices, labels, weight, stats, scale, options: LossOptions) -> Tensor:
    """d loss / d input, with every factor folded in before the result is rounded to input's dtype."""
    z, t = _float(input, input), _float(target, input)
    w = row_weight(z, labels, weight, options.ignore_index)
    factor = torch.where(w == 0, 0, upstream * scale * w)[:, None]
    return torch.where(factor == 0, 0, _gradient(z, t, indices, labels, options) * factor).to(input.dtype)


def derivative(upstream, input, target, indices, labels, weight, options: LossOptions) -> Tensor:
    """As :func:`backward`, by differentiable operations: of input and of upstream, at 0 as well."""
    z, t = _float(input, input), _float(target, input)
    w = row_weight(z.detach(), labels, weight, options.ignore_index)
    # A row that does not count may hold anything, and 0 times the derivative of NaN is NaN.
    z, t = (torch.where(w[:, None] == 0, 1, each) for each in (z, t))
    total = w.sum()
    scale = torch.where(total > 0, 1 / total, 0) if options.reduction == "mean" else 1
    return (_gradient(z, t, indices, labels, options) * (upstream * scale * w)[:, None]).to(input.dtype)


def _gradient(z: Tensor, t: Tensor, indices: Tensor | None, labels: Tensor | None, options: LossOptions) -> Tensor:
    """The gradient of each row's loss of weight 1 in its logits."""
    grad, classes, temperature = torch.zeros_like(z), z.shape[1], options.temperature
    if options.divergence == "decoupled":
        grad = options.soft_weight * temperature * _decoupled(z, t, labels, options)[1]
    elif options.soft_weight:
        q = _log_softmax(z, temperature)[0].exp()
        p = _teacher(t, indices, classes, temperature, options.target_type)[0]
        grad = grad + options.soft_weight * temperature * (q - p)
    if options.hard_weight:
        smoothing = options.label_smoothing
        inside = ((labels >= 0) & (labels < classes)).to(z.dtype)
        one_hot = torch.zeros_like(z).scatter_(1, labels.clamp(0, classes - 1)[:, None], inside[:, None])
        hard = _log_softmax(z, 1.0)[0].exp() - (1 - smoothing) * one_hot - smoothing / classes
        grad = grad + options.hard_weight * hard
    return grad


def metrics(
    input: Tensor, target: Tensor, labels: Tensor | None, temperature: float, ignore_index: int
) -> list[Tensor]:
    """See ``kr_fast.ops.distillation.distillation_metrics``."""
    z, t = _float(input, input), _float(target, input)
    log_q, log_p = _log_softmax(z, temperature)[0], _log_softmax(t, temperature)[0]
    kl = temperature**2 * _kl_terms(log_p.exp(), log_q.exp(), log_p - log_q).sum(1)
    log_t = _log_softmax(t, 1.0)[0]
    p, first_z, first_t = log_t.exp(), z.argmax(1), t.argmax(1)
    values = [kl.float(), first_z == first_t, p.amax(1).float(), -torch.where(p == 0, 0, p * log_t).sum(1).float()]
    if labels is None:
        return values
    ignored = labels == ignore_index
    counts = (labels >= 0) & (labels < z.shape[1]) & ~ignored
    picked = _log_softmax(z, 1.0)[0].gather(1, torch.where(counts, labels, 0)[:, None])[:, 0]
    cross_entropy = torch.where(counts, -picked, torch.where(ignored, 0.0, math.nan))  # NaN: a label that is no class
    return [*values, cross_entropy.float(), counts & (first_z == labels), counts & (first_t == labels)]


differentiable("distillation_loss", "reference", Differentiable(forward, backward), refuses=never)


kernel("distillation_metrics", "reference", refuses=never)(metrics)
