"""Kernels of the family ``distillation`` in ``kr_fast._cpu``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.native import address


def _loss(
    input, target, indices, labels, weight,
    temperature, target_type, divergence, alpha, beta, soft, hard, smoothing, ignore_index,
    *, loss=False, row_loss=None, grad=None, upstream=None, mean=False,
) -> float:  # fmt: skip
    """What is wanted of one call, written to ``row_loss`` and ``grad``; the loss over all rows is returned."""
    if target.dtype == torch.float64:
        target = target.float()
    rows, classes = input.shape
    total, invalid = native.cpu.distillation_loss(
        loss, address(row_loss), address(grad), address(upstream),
        upstream.stride(0) if upstream is not None and upstream.ndim else 0, mean, torch.get_num_threads(),
        input.data_ptr(), target.data_ptr(), codes.DTYPES[input.dtype], codes.DTYPES[target.dtype], rows, classes,
        input.stride(0), target.stride(0), address(labels), address(weight),
        temperature, soft, hard, smoothing, ignore_index, codes.TARGET_KINDS[target_type], address(indices),
        target.shape[1], target_type == "topk_smooth", codes.DIVERGENCES[divergence], alpha, beta,
    )  # fmt: skip
    if invalid >= 0:
        _refuse_row(codes.public_name(target_type, divergence), invalid, classes, indices, labels, ignore_index)
    return total


def _refuse_row(op, row, classes, indices, labels, ignore_index):
    if labels is not None and not (0 <= int(labels[row]) < classes) and int(labels[row]) != ignore_index:
        rule, found = f"labels must be in [0, {classes}) or ignore_index {ignore_index}", int(labels[row])
    else:
        rule, found = f"indices must be in [0, {classes})", indices[row].tolist()
    raise ValueError(f"{op}: {rule}, got {found} in row {row}")


def _distillation_forward(input, target, indices, labels, weight, *parameters):
    *parameters, reduction = parameters
    rows = torch.empty(len(input), dtype=torch.float32) if reduction == "none" else None
    total = _loss(
        input, target, indices, labels, weight, *parameters, loss=True, row_loss=rows, mean=reduction == "mean"
    )
    loss = torch.scalar_tensor(total, dtype=torch.float32) if rows is None else rows
    return loss, torch.empty(0, 5), torch.ones(())  # nothing is kept for backward: it takes the exponentials again


def _distillation_backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters) -> Tensor:
    *parameters, reduction = parameters
    grad = torch.empty(input.shape, dtype=input.dtype)
    upstream = upstream.float()
    _loss(input, target, indices, labels, weight, *parameters, grad=grad, upstream=upstream, mean=reduction == "mean")
    return grad


def _distillation_both(input, target, indices, labels, weight, *parameters) -> tuple[Tensor, Tensor, None]:
    *parameters, reduction = parameters
    # empty_like keeps the strides of logits that are not contiguous, but costs less
    grad = torch.empty_like(input) if input.is_contiguous() else torch.empty(input.shape, dtype=input.dtype)
    total = _loss(input, target, indices, labels, weight, *parameters, loss=True, grad=grad, mean=reduction == "mean")
    return torch.scalar_tensor(total, dtype=torch.float32), grad, None


registry.differentiable(
    "distillation_loss",
    "cpu",
    registry.Differentiable(_distillation_forward, _distillation_backward, _distillation_both),
    refuses=native.cpu_tensors(*codes.DTYPES),
)


@registry.kernel("distillation_metrics", "cpu", refuses=native.cpu_tensors(*codes.DTYPES))
def distillation_metrics(input: Tensor, target: Tensor, labels: Tensor | None, temperature: float) -> list[Tensor]:
    if target.dtype == torch.float64:
        target = target.float()
    rows, classes = input.shape
    kl, confidence, entropy, cross = (torch.empty(rows, dtype=torch.float32) for _ in range(4))
    agreement, student, teacher = (torch.empty(rows, dtype=torch.bool) for _ in range(3))
    if labels is None:
        cross = student = teacher = None
    native.cpu.distillation_metrics(
        input.data_ptr(), target.data_ptr(), codes.DTYPES[input.dtype], codes.DTYPES[target.dtype], rows, classes,
        input.stride(0), target.stride(0), address(labels), temperature, kl.data_ptr(), address(cross),
        confidence.data_ptr(), entropy.data_ptr(), agreement.data_ptr(), address(student), address(teacher),
        torch.get_num_threads(),
    )  # fmt: skip
    return [value for value in (kl, agreement, confidence, entropy, cross, student, teacher) if value is not None]
