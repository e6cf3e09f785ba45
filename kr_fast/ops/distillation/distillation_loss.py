"""Soft-label distillation from raw logits: tempered KL divergence, hard-label cross-entropy and weights in one op."""

import torch
from torch import Tensor

from kr_fast.ops import _check
from kr_fast.ops.distillation import autograd, checks
from kr_fast.ops.distillation.checks import loss_options, loss_tensors


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
    validate_args: bool = False,
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
        labels: ``[N]`` or ``[N, 1]`` int64 (or another integer dtype) in [0, C), or ``ignore_index`` for a row that
            counts in neither term.
        temperature: ``T`` > 0.
        target_type: "logits", "probs" or "log_probs".
        soft_weight, hard_weight: >= 0; a hard weight above 0 needs ``labels``.
        label_smoothing: in [0, 1).
        sample_weight: ``[N]`` float or bool, >= 0; a row of weight 0 costs nothing, whatever it holds.
        standardize: the divergence is taken of ``(z - mean) / std`` of each row, of student and teacher (logit
            standardisation), std with C - 1 as in the authors' code; the hard term stays with the logits as they are.
        reduction: "none" (``[N]``), "sum", or "mean" = sum / sum of the weights of the rows that count (0 if there is
            none: unlike torch, no NaN).
        validate_args: also check values: no NaN in ``target``, probabilities >= 0 in rows that sum to 1 within 1e-2,
            weights >= 0. Reads them once more, and waits for a GPU. Labels are checked on a CPU in any case.
    Returns: float32 (float64 for float64 input), scalar or ``[N]``. The gradient has ``input``'s dtype. With
        ``create_graph`` backward is in plain torch, so that higher derivatives are right. Forward-mode AD and
        ``torch.func`` are refused.
    Raises: TypeError or ValueError naming the argument; teacher and weights must not require a gradient.
    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2; Sun et al.,
        "Logit Standardization in Knowledge Distillation", CVPR 2024, for ``standardize``.
    """
    op = "distillation_loss"
    options = loss_options(
        op, temperature, target_type, soft_weight, hard_weight, label_smoothing, ignore_index, reduction
    )
    tensors = loss_tensors(op, input, target, labels, sample_weight, options)
    if validate_args:
        checks.values(op, tensors[1], target_type, tensors[4])
    if not standardize:
        return autograd.apply(*tensors, options)
    if target_type != "logits":
        _check.fail(op, "target_type", "be logits with standardize", target_type)
    return autograd.apply_standardized(*tensors, options)


def soft_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    target_type: str = "probs",
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy against soft labels: ``l_i = -w_i T^2 sum_j p_ij ln q_ij`` with ``q = softmax(z / T)``.

    It is :func:`distillation_loss` plus the teacher's entropy: the same gradient, for rows of ``p`` that sum to 1.
    ``p = 0`` costs nothing, also where ``q = 0``.

    Args, Returns, Raises: as :func:`distillation_loss`.
    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    op = "soft_cross_entropy"
    options = loss_options(op, temperature, target_type, reduction=reduction, divergence="cross")
    return autograd.apply(*loss_tensors(op, input, target, None, sample_weight, options), options)


def distillation_loss_topk(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "smooth",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """:func:`distillation_loss` from cached top-k soft labels, which are never written out as ``[N, C]``.

    Row i's teacher gives ``values[i, k]`` to class ``indices[i, k]``. ``tail="smooth"`` spreads what the row lacks to 1
    evenly over its other ``C - k`` classes; ``tail="renorm"`` gives them 0 and divides the values by their sum.

    Args:
        input: student logits, ``[N, C]``, as for :func:`distillation_loss`.
        values: probabilities, already tempered, ``[N, k]``, 1 <= k <= C, floating. A row sums to at most 1 where the
            tail is smoothed, to more than 0 where the row is renormalised.
        indices: ``[N, k]`` int64 or another integer dtype, in [0, C), no class twice in a row (not checked).
        tail: "smooth" or "renorm".
        labels, ...: as :func:`distillation_loss`.
    Returns, Raises: as :func:`distillation_loss`.
    Source: Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, section 3.2
        (marginal smoothing and marginal re-normalisation).
    """
    op = "distillation_loss_topk"
    checks.logits_and_target(op, input, values, same_shape=False)
    top_k = values.shape[1]
    if values.shape[0] != input.shape[0] or not 1 <= top_k <= input.shape[1]:
        _check.fail(op, "values", f"be [{input.shape[0]}, k] with 1 <= k <= {input.shape[1]}", values)
    indices = _check.integers(op, "indices", indices)
    if indices.shape != values.shape or indices.device != input.device:
        _check.fail(op, "indices", f"be {list(values.shape)} on {input.device}", indices)
    if tail not in ("smooth", "renorm"):
        _check.fail(op, "tail", "be one of smooth, renorm", tail)
    target_type = f"topk_{tail}"
    options = loss_options(
        op, temperature, target_type, soft_weight, hard_weight, label_smoothing, ignore_index, reduction
    )
    return autograd.apply(*loss_tensors(op, input, values, labels, sample_weight, options, indices), options)


def distillation_loss_and_grad(
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
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """``(loss, d loss / d input)`` of :func:`distillation_loss` without autograd, for loops of one's own.

    Nothing is recorded and, on a GPU, nothing waits for the device: both can be captured in a CUDA graph. For float16
    logits the gradient may underflow; scale it in float32 instead.

    Args, Raises: as :func:`distillation_loss`; ``reduction`` is "mean" or "sum".
    Returns: the loss as there, and the gradient ``[N, C]``, contiguous, of ``input``'s dtype.
    """
    op = "distillation_loss_and_grad"
    if reduction == "none":
        _check.fail(op, "reduction", "be one of mean, sum", reduction)
    options = loss_options(
        op, temperature, target_type, soft_weight, hard_weight, label_smoothing, ignore_index, reduction
    )
    input, *tensors = loss_tensors(op, input, target, labels, sample_weight, options)
    return autograd.loss_and_grad(input.detach(), *tensors, options)


class DistillationLoss(torch.nn.Module):
    """:func:`distillation_loss` as a module: ``DistillationLoss(temperature=4.0)(student_logits, teacher_logits)``.

    Args, Raises: as :func:`distillation_loss`. ``forward`` takes ``input``, ``target``, ``labels`` and
    ``sample_weight``, the constructor all else.
    """

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
        validate_args: bool = False,
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
            "validate_args": validate_args,
        }

    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """As the function."""
        return distillation_loss(input, target, labels, sample_weight=sample_weight, **self.options)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
