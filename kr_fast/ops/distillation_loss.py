"""Soft-label distillation from raw logits: tempered KL divergence, hard-label cross-entropy and weights in one op."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kr_fast.backends import registry
from kr_fast.ops import _check
from kr_fast.ops._library import define, is_plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_TYPES = {"logits": 0, "probs": 1, "log_probs": 2}
REDUCTIONS = ("none", "mean", "sum")
STATS = 5  # a row's max and ln sum of the student (at T), of the teacher (at T), and the student's ln sum at 1

_PARAMETERS = (
    "float temperature, int target_kind, float soft, float hard, float smoothing, int ignore_index, str reduction"
)


def _loss_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _forward_fake(input, target, labels, weight, temperature, kind, soft, hard, smoothing, ignore_index, reduction):
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == "none" else (), dtype=_loss_dtype(input))
    return loss, loss.new_empty((rows if input.is_cuda else 0, STATS)), loss.new_empty(())


@define(
    "distillation_loss_forward(Tensor input, Tensor target, Tensor? labels, Tensor? weight, "
    f"{_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
def _forward(input, target, labels, weight, temperature, kind, soft, hard, smoothing, ignore_index, reduction):
    run = registry.resolve("distillation_loss", input.device.type, input.dtype, input.shape[1])
    return run.forward(input, target, labels, weight, temperature, kind, soft, hard, smoothing, ignore_index, reduction)


def _backward_fake(upstream, input, target, labels, weight, stats, scale, *parameters):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@define(
    "distillation_loss_backward(Tensor upstream, Tensor input, Tensor target, Tensor? labels, Tensor? weight, "
    f"Tensor stats, Tensor scale, {_PARAMETERS}) -> Tensor",
    fake=_backward_fake,
)
def _backward(upstream, input, target, labels, weight, stats, scale, *parameters):
    run = registry.resolve("distillation_loss", input.device.type, input.dtype, input.shape[1])
    return run.backward(upstream, input, target, labels, weight, stats, scale, *parameters)


class _InTwo(torch.autograd.Function):
    """Forward, then backward, which recomputes from the logits with the upstream gradient folded in in float32.

    ``run`` is the kernel's pair, or None for the dispatcher's ops, which torch.compile can trace.
    """

    @staticmethod
    def forward(ctx, run, input, target, labels, weight, parameters):
        forward = run.forward if run else torch.ops.kr_fast.distillation_loss_forward
        loss, stats, scale = forward(input, target, labels, weight, *parameters)
        ctx.save_for_backward(input, target, labels, weight, stats, scale)
        ctx.run, ctx.parameters = run, parameters
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        backward = ctx.run.backward if ctx.run else torch.ops.kr_fast.distillation_loss_backward
        grad = backward(upstream, *ctx.saved_tensors, *ctx.parameters)
        return None, grad, None, None, None, None


class _InOne(torch.autograd.Function):
    """Loss and gradient in one pass; backward hands the gradient over where the upstream gradient is 1.

    Not for float16: its gradient would underflow before a loss scale arrives. Not for a device whose scalars cannot be
    read without a wait.
    """

    @staticmethod
    def forward(ctx, run, input, target, labels, weight, parameters):
        loss, ctx.grad = run.both(input, target, labels, weight, *parameters)
        ctx.save_for_backward(input, target, labels, weight)
        ctx.run, ctx.parameters = run, parameters
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        saved = ctx.saved_tensors  # also refuses logits that were changed in place since
        # Given away, not shared: autograd may then keep it as .grad without a copy, and add to it.
        grad, ctx.grad = ctx.grad, None
        factor = upstream.item()
        if grad is not None and factor != 1 and grad.dtype == torch.float32:
            grad.mul_(factor)
        elif grad is None or factor != 1:  # a second backward; or another rounding to bfloat16
            grad = ctx.run.backward(upstream, *saved, None, None, *ctx.parameters)
        return None, grad, None, None, None, None


def _apply(input: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None, parameters: tuple) -> Tensor:
    """By the shortest way: the dispatcher costs more than a small batch's kernels, so plain tensors go past it."""
    if torch.compiler.is_compiling() or not (is_plain(input) and is_plain(target)):
        return _InTwo.apply(None, input, target, labels, weight, parameters)
    run = registry.resolve("distillation_loss", input.device.type, input.dtype, input.shape[1])
    if not (input.requires_grad and torch.is_grad_enabled()):
        return run.forward(input, target, labels, weight, *parameters)[0]
    in_one = run.both and parameters[-1] != "none" and input.dtype != torch.float16
    return (_InOne if in_one else _InTwo).apply(run, input, target, labels, weight, parameters)


def distillation_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    target_type: str = "logits",
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Knowledge-distillation loss of student logits against a teacher.

    ``l_i = w_i (soft_weight T^2 KL(p_i || q_i) + hard_weight CE(z_i, y_i))`` with ``q = softmax(z / T)``,
    ``p = softmax(t / T)`` for ``target_type="logits"`` or ``p = target`` as given (already tempered) otherwise, and CE
    at temperature 1 with ``label_smoothing``. The divergence is summed as ``p (d + expm1(-d))``, ``d = ln p - ln q``:
    never negative, exactly 0 where student and teacher agree. ``p = 0`` costs nothing, both ``-inf`` contribute 0, and
    ``q = 0 < p`` gives inf.

    Args:
        input: student logits ``z``, ``[N, C]``, C >= 2; float32, bfloat16, float16 (float64 on the reference backend);
            any row stride.
        target: teacher logits, probabilities or log-probabilities, ``[N, C]``, any of these dtypes. Rows of
            probabilities must sum to 1.
        labels: ``[N]`` int64 in [0, C), or ``ignore_index`` for a row that counts in neither term.
        temperature: ``T`` > 0.
        target_type: "logits", "probs" or "log_probs".
        soft_weight, hard_weight: >= 0; a hard weight above 0 needs ``labels``.
        label_smoothing: in [0, 1).
        sample_weight: ``[N]`` float or bool, >= 0; a row of weight 0 costs nothing, whatever it holds.
        standardize: replace both logits by ``(z - mean) / std`` of their row first (logit standardisation).
        reduction: "none" (``[N]``), "sum", or "mean" = sum / sum of the weights of the rows that count (0 if there is
            none: unlike torch, no NaN).
    Returns: float32 (float64 for float64 input), scalar or ``[N]``. The gradient has ``input``'s dtype.
    Raises: TypeError or ValueError naming the argument; the teacher must not require a gradient.
    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2; Sun et al.,
        "Logit Standardization in Knowledge Distillation", CVPR 2024, for ``standardize``.
    """
    op = "distillation_loss"
    _check.no_transform(op)
    _check.tensor(op, "input", input, ndim=2, dtypes=FLOATS)
    _check.tensor(op, "target", target, ndim=2, dtypes=FLOATS)
    if input.shape != target.shape:
        _check.fail(op, "target", f"have input's shape {list(input.shape)}", target)
    if input.shape[1] < 2:
        _check.fail(op, "input", "have at least 2 classes", input)
    if input.device != target.device:
        _check.fail(op, "target", f"be on input's device {input.device}", target)
    if target.requires_grad:
        _check.fail(op, "target", "not require a gradient (detach the teacher)", target)
    if not (0 < temperature < math.inf):
        _check.fail(op, "temperature", "be above 0 and finite", temperature)
    if target_type not in TARGET_TYPES:
        _check.fail(op, "target_type", f"be one of {', '.join(TARGET_TYPES)}", target_type)
    if reduction not in REDUCTIONS:
        _check.fail(op, "reduction", f"be one of {', '.join(REDUCTIONS)}", reduction)
    for name, value in (("soft_weight", soft_weight), ("hard_weight", hard_weight)):
        if not (0 <= value < math.inf):
            _check.fail(op, name, "be at least 0 and finite", value)
    if not 0 <= label_smoothing < 1:
        _check.fail(op, "label_smoothing", "be in [0, 1)", label_smoothing)
    if labels is not None:
        labels = _labels(op, labels, input)
    elif hard_weight > 0:
        _check.fail(op, "labels", "be given where hard_weight is above 0", None, TypeError)
    if sample_weight is not None:
        _check.tensor(op, "sample_weight", sample_weight, ndim=1)
        if len(sample_weight) != len(input) or sample_weight.device != input.device:
            _check.fail(op, "sample_weight", f"be [{len(input)}] on {input.device}", sample_weight)
        sample_weight = sample_weight.detach().to(_loss_dtype(input)).contiguous()
    if standardize:
        if target_type != "logits":
            _check.fail(op, "target_type", "be logits with standardize", target_type)
        input, target = _standardized(input), _standardized(target)
    if input.stride(1) != 1:
        input = input.contiguous()
    if target.stride(1) != 1:
        target = target.contiguous()
    parameters = (
        float(temperature), TARGET_TYPES[target_type], float(soft_weight), float(hard_weight),
        float(label_smoothing), ignore_index, reduction,
    )  # fmt: skip
    return _apply(input, target, labels, sample_weight, parameters)


def _labels(op: str, labels: Tensor, input: Tensor) -> Tensor:
    _check.tensor(op, "labels", labels, ndim=1, dtypes=(torch.int64, torch.int32))
    if labels.shape[0] != input.shape[0] or labels.device != input.device:
        _check.fail(op, "labels", f"be [{len(input)}] on {input.device}", labels)
    if labels.dtype == torch.int64 and labels.is_contiguous():
        return labels
    return labels.to(torch.int64).contiguous()


def _standardized(logits: Tensor) -> Tensor:
    """``(z - mean) / (std + 1e-7)`` by row, unbiased std; a constant row becomes 0 with a zero gradient."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (logits.shape[1] - 1)
    return centred / (variance.clamp_min(1e-30).sqrt() + 1e-7)


class DistillationLoss(torch.nn.Module):
    """:func:`distillation_loss` as a module: ``DistillationLoss(temperature=4.0)(student_logits, teacher_logits)``."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        target_type: str = "logits",
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        standardize: bool = False,
        reduction: str = "mean",
    ):
        super().__init__()
        self.options = {
            "temperature": temperature,
            "target_type": target_type,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "standardize": standardize,
            "reduction": reduction,
        }

    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """As the function."""
        return distillation_loss(input, target, labels, sample_weight=sample_weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
