"""Checks of the distillation ops' arguments, each made once: what leaves here is what the kernels take."""

import functools
import math
import numbers

import torch
from torch import Tensor

from kr_fast.backends.arguments import LossOptions
from kr_fast.ops import _check

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_TYPES = ("logits", "probs", "log_probs")
REDUCTIONS = ("none", "mean", "sum")


def loss_options(op: str, *values, **named) -> LossOptions:
    """``LossOptions(*values, **named)``, checked."""
    if torch.compiler.is_compiling():
        return _loss_options.__wrapped__(op, *values, **named)
    _check.no_trace(op)
    return _loss_options(op, *values, **named)


@functools.lru_cache(maxsize=1024, typed=True)  # a training loop asks for the same ones again and again
def _loss_options(op: str, *positional, **named) -> LossOptions:
    given = LossOptions(*positional, **named)
    weights = {name: getattr(given, name) for name in ("soft_weight", "hard_weight", "alpha", "beta")}
    numeric_options(op, given.temperature, given.reduction, given.label_smoothing, **weights)
    if isinstance(given.ignore_index, bool) or not isinstance(given.ignore_index, numbers.Integral):
        _check.fail(op, "ignore_index", "be an int", given.ignore_index, TypeError)
    values = {"temperature": given.temperature, "label_smoothing": given.label_smoothing, **weights}
    floats = {name: float(value) for name, value in values.items()}
    return given.changed(ignore_index=int(given.ignore_index), **floats)


def numeric_options(
    op: str, temperature: float, reduction: str = "none", label_smoothing: float = 0.0, **weights: float
) -> None:
    """Numbers in their ranges; weights are at least 0."""
    for name, value in ("temperature", temperature), ("label_smoothing", label_smoothing), *weights.items():
        # A tensor would also do, but reading it is a wait for a GPU.
        if isinstance(value, Tensor) or not isinstance(value, (float, int, numbers.Real, torch.SymFloat)):
            _check.fail(op, name, "be a number", value, TypeError)
    if not (0 < temperature < math.inf):
        _check.fail(op, "temperature", "be above 0 and finite", temperature)
    if reduction not in REDUCTIONS:
        _check.fail(op, "reduction", f"be one of {', '.join(REDUCTIONS)}", reduction)
    for name, value in weights.items():
        if not (0 <= value < math.inf):
            _check.fail(op, name, "be at least 0 and finite", value)
    if not 0 <= label_smoothing < 1:
        _check.fail(op, "label_smoothing", "be in [0, 1)", label_smoothing)


def logits_and_target(
    op: str, input: Tensor, target: Tensor, *, same_shape: bool = True, detached: bool = True
) -> None:
    """Student logits and what is known of the teacher: floating, on one device, the same rows, no teacher gradient."""
    _check.no_transform(op, input=input, target=target)
    _check.tensor(op, "input", input, ndim=2, dtypes=FLOATS)
    _check.tensor(op, "target", target, ndim=2, dtypes=FLOATS)
    if input.shape[1] < 2:
        _check.fail(op, "input", "have at least 2 classes", input)
    if input.layout is not torch.strided or target.layout is not torch.strided:
        _check.fail(op, "input and target", "be dense", f"{input.layout} and {target.layout}")
    if input.device != target.device:
        _check.fail(op, "target", f"be on input's device {input.device}", target)
    if detached and target.requires_grad:
        _check.fail(op, "target", "not require a gradient (detach the teacher)", target)
    if same_shape and input.shape != target.shape:
        _check.fail(op, "target", f"have input's shape {list(input.shape)}", target)


def loss_tensors(
    op: str,
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    sample_weight: Tensor | None,
    options: LossOptions,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(input, target, indices, labels, weight) as the kernels take them; with indices, the first two are checked."""
    if indices is None:
        logits_and_target(op, input, target)
        if options.target_type not in TARGET_TYPES:
            _check.fail(op, "target_type", f"be one of {', '.join(TARGET_TYPES)}", options.target_type)
    if labels is not None:
        labels = _check.labels(op, labels, input.shape[:1], input.device)
    elif options.divergence == "decoupled" or options.hard_weight:
        why = "the loss is decoupled" if options.divergence == "decoupled" else "hard_weight is above 0"
        _check.fail(op, "labels", f"be given where {why}", None, TypeError)
    if sample_weight is not None:
        sample_weight = _weight(op, sample_weight, input)
    return unit_stride(input), unit_stride(target), indices, labels, sample_weight


def _weight(op: str, sample_weight: Tensor, input: Tensor) -> Tensor:
    _check.tensor(op, "sample_weight", sample_weight, ndim=1)
    if sample_weight.shape[0] != input.shape[0] or sample_weight.device != input.device:
        _check.fail(op, "sample_weight", f"be [{len(input)}] on {input.device}", sample_weight)
    if sample_weight.requires_grad:
        _check.fail(op, "sample_weight", "not require a gradient (detach it)", sample_weight)
    return sample_weight.to(loss_dtype(input)).contiguous()


def loss_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` with rows of stride 1 inside."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def classes_of(op: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Labels that lie in [0, classes) or are ``ignore_index``: it reads them, and so waits for a GPU."""
    outside = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(outside.any()):
        _check.fail(op, "labels", f"be in [0, {classes}) or ignore_index {ignore_index}", int(labels[outside][0]))


def values(op: str, target: Tensor, target_type: str, weight: Tensor | None) -> None:
    """What ``validate_args`` asks for: it reads the values, and so waits for a GPU."""
    if target_type in ("probs", "log_probs"):
        p = target.double() if target_type == "probs" else target.double().exp()
        if bool((~(p >= 0)).any()):  # NaN as well
            at = (~(p >= 0)).nonzero()[0].tolist()
            rule = "hold probabilities, at least 0" if target_type == "probs" else "hold log-probabilities, not NaN"
            _check.fail(op, "target", rule, f"{target[tuple(at)].item()} at {at}")
        total = p.sum(1)
        if bool(((total - 1).abs() > 1e-2).any()):  # rows that were rounded to bfloat16 pass
            row = int(((total - 1).abs() > 1e-2).nonzero()[0])
            _check.fail(op, "target", "have rows that sum to 1", f"{total[row].item():.6g} in row {row}")
    elif bool(torch.isnan(target).any()):
        _check.fail(op, "target", "not hold NaN", f"NaN at {torch.isnan(target).nonzero()[0].tolist()}")
    if weight is not None and bool((~(weight >= 0)).any()):
        row = int((~(weight >= 0)).nonzero()[0])
        _check.fail(op, "sample_weight", "be at least 0", f"{weight[row].item()} in row {row}")
