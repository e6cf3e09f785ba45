"""Kernels of the family ``distillation`` in ``kr_fast._cpu``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry, structs
from kr_fast.backends.arguments import LossOptions
from kr_fast.backends.native import address


def _loss(tensors, options: LossOptions, *, loss=False, row_loss=None, grad=None, upstream=None) -> float:
    """One call, which writes into ``row_loss`` and ``grad``; returns the loss over all rows if that is requested."""
    input, target, indices, labels, weight = tensors
    if target.dtype == torch.float64:
        target = target.float()
    call = structs.distillation_loss(input, target, indices, labels, weight, options)
    request = {"loss": loss, "row_loss": address(row_loss), "grad": address(grad), "upstream": address(upstream)}
    request["upstream_step"] = upstream.stride(0) if upstream is not None and upstream.ndim else 0
    total, invalid = native.cpu.distillation_loss(call, request, torch.get_num_threads())
    if invalid >= 0:
        _refuse_row(invalid, input.shape[1], indices, labels, options)
    return total


def _refuse_row(row: int, classes: int, indices: Tensor | None, labels: Tensor | None, options: LossOptions):
    op, ignore_index = codes.public_name(options.target_type, options.divergence), options.ignore_index
    if labels is not None and not (0 <= int(labels[row]) < classes) and int(labels[row]) != ignore_index:
        rule, value = f"labels must be in [0, {classes}) or ignore_index {ignore_index}", int(labels[row])
    else:
        rule, value = f"indices must be in [0, {classes})", indices[row].tolist()
    raise ValueError(f"{op}: {rule}, got {value} in row {row}")


def _loss_forward(input, target, indices, labels, weight, options):
    rows = native.empty(len(input)) if options.reduction == "none" else None
    total = _loss((input, target, indices, labels, weight), options, loss=True, row_loss=rows)
    loss = native.scalar(total) if rows is None else rows
    # Nothing is kept for backward: it takes the exponentials again.
    return loss, native.empty(0, codes.LOSS_STATISTICS), native.scalar(1.0)


def _loss_backward(upstream, input, target, indices, labels, weight, stats, scale, options) -> Tensor:
    grad = native.empty(*input.shape, dtype=input.dtype)
    _loss((input, target, indices, labels, weight), options, grad=grad, upstream=upstream.float())
    return grad


def _loss_forward_backward(input, target, indices, labels, weight, options) -> tuple[Tensor, Tensor, None]:
    # empty_like keeps the strides of logits that are not contiguous, but costs less
    grad = torch.empty_like(input) if input.is_contiguous() else native.empty(*input.shape, dtype=input.dtype)
    total = _loss((input, target, indices, labels, weight), options, loss=True, grad=grad)
    return native.scalar(total), grad, None


registry.differentiable(
    "distillation_loss",
    "cpu",
    registry.Differentiable(_loss_forward, _loss_backward, _loss_forward_backward),
    refuses=native.cpu_tensors(*codes.DTYPES),
)


@registry.kernel("distillation_metrics", "cpu", refuses=native.cpu_tensors(*codes.DTYPES))
def distillation_metrics(
    input: Tensor, target: Tensor, labels: Tensor | None, temperature: float, ignore_index: int
) -> list[Tensor]:
    if labels is not None and 0 <= ignore_index < input.shape[1]:  # C++ counts every class
        labels = labels.masked_fill(labels == ignore_index, -1)
    if target.dtype == torch.float64:
        target = target.float()
    outputs = codes.empty_metrics(input, labels)
    call = structs.distillation_metrics(input, target, labels, temperature, outputs)
    native.cpu.distillation_metrics(call, torch.get_num_threads())
    return outputs
