"""How a student stands to its teacher, row by row and without gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from kr_fast.backends import codes, registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.ops import _check
from kr_fast.ops._library import call, define
from kr_fast.ops.distillation import checks


class DistillationMetrics(NamedTuple):
    """One value a row, ``[N]``: float32, and bool where the name says so."""

    kl: Tensor
    agreement: Tensor  # bool
    teacher_confidence: Tensor
    teacher_entropy: Tensor
    cross_entropy: Tensor | None
    student_correct: Tensor | None  # bool
    teacher_correct: Tensor | None  # bool


def _fake(input, target, labels, temperature, ignore_index):
    return codes.empty_metrics(input, labels)


_SCHEMA = "Tensor input, Tensor target, Tensor? labels, float temperature, int ignore_index"


@define(f"distillation_metrics({_SCHEMA}) -> Tensor[]", fake=_fake)
def _impl(input, target, labels, temperature, ignore_index):
    if labels is not None and not labels.is_cuda:  # on a GPU it would be a wait
        checks.classes_of("distillation_metrics", labels, input.shape[1], ignore_index)
    run = registry.resolve("distillation_metrics", ClassesCall(input.device.type, input.dtype, input.shape[1]))
    return run(input, target, labels, temperature, ignore_index)


def distillation_metrics(
    input: Tensor, target: Tensor, labels: Tensor | None = None, *, temperature: float = 1.0, ignore_index: int = -100
) -> DistillationMetrics:
    """Per-row statistics of student logits ``z`` and teacher logits ``t``, all from one read of both.

    ``kl = T^2 KL(softmax(t / T) || softmax(z / T))``, the row of :func:`distillation_loss`;
    ``agreement``: both have their (first) largest logit at the same class. At temperature 1: ``teacher_confidence`` =
    the teacher's largest probability, ``teacher_entropy = -sum p_j ln p_j``, ``cross_entropy = -ln q_y``, and
    ``student_correct``, ``teacher_correct``: the largest logit is at the label.

    Args:
        input, target: logits ``[N, C]``, C >= 2; float32, bfloat16, float16 (float64 on the reference backend).
        labels: ``[N]`` int64 or another integer dtype, in [0, C), or ``ignore_index``: such a row has cross_entropy 0
            and is not correct. Any other label raises; on a GPU, which is not waited for, cross_entropy is NaN.
        temperature: ``T`` > 0.
    Returns: :class:`DistillationMetrics`; without labels its last three fields are None. Nothing has a gradient.
    Raises: TypeError or ValueError naming the argument.
    """
    op = "distillation_metrics"
    checks.logits_and_target(op, input, target, detached=False)
    checks.numeric_options(op, temperature)
    if labels is not None:
        labels = _check.labels(op, labels, input.shape[:1], input.device)
    ignore_index = _check.integer(op, "ignore_index", ignore_index, -(2**63), 2**63)
    tensors = checks.unit_stride(input.detach()), checks.unit_stride(target.detach()), labels
    values = call(torch.ops.kr_fast.distillation_metrics.default, *tensors, float(temperature), ignore_index)
    return DistillationMetrics(*values, *[None] * (7 - len(values)))
