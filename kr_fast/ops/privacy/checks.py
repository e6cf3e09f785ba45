"""What the ops of this family ask of their arguments."""

import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kr_fast.ops import _check


def signals(op: str, x: Tensor, grad_output: Tensor, low: int) -> None:
    """Both are floating-point tensors of at least ``low`` dimensions, alike in number and on one device."""
    for name, value in (("x", x), ("grad_output", grad_output)):
        _check.tensor(op, name, value, dtypes=_check.FLOATING)
        if value.ndim < low:
            _check.fail(op, name, f"have at least {low} dimensions", value)
    if grad_output.ndim != x.ndim or grad_output.device != x.device:
        _check.fail(op, "grad_output", f"have {x.ndim} dimensions on {x.device}", grad_output)


def records(op: str, rows: int, multiplicity: int) -> int:
    """``multiplicity`` as an int that divides the rows of the batch."""
    multiplicity = _check.integer(op, "multiplicity", multiplicity, 1, 2**31)
    if rows % multiplicity:
        _check.fail(op, "multiplicity", f"divide the {rows} rows of the batch", multiplicity)
    return multiplicity


def flag(op: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        _check.fail(op, name, "be a bool", value, TypeError)


def epsilon(op: str, eps: float) -> float:
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 <= eps < float("inf"):
        _check.fail(op, "eps", "be a finite number of at least 0", eps)
    return float(eps)


def convolution(
    op: str,
    x: Tensor,
    grad_output: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    bias: bool,
    multiplicity: int,
) -> tuple[Any, ...]:
    """The arguments in the order of the ops' schema, ``padding`` as what lies above and left of the image."""
    signals(op, x, grad_output, 4)
    if x.ndim != 4:
        _check.fail(op, "x", "have 4 dimensions", x)
    kernel_size, stride, dilation = (
        _check.pair(op, name, value, 1)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    groups = _check.integer(op, "groups", groups, 1, 2**31)
    channels, outputs = x.shape[1], grad_output.shape[1]
    if channels % groups or outputs % groups or not channels or not outputs:
        _check.fail(op, "groups", f"divide {channels} channels of x and {outputs} of grad_output", groups)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if padding == "same" and stride != (1, 1):
        _check.fail(op, "padding", 'not be "same" with a stride above 1', padding)
    if isinstance(padding, str) and padding not in ("same", "valid"):
        _check.fail(op, "padding", 'be "same", "valid", an int or a pair of them', padding)
    total = spans if padding == "same" else [0, 0]  # above and below together
    before = tuple(each // 2 for each in total)  # as torch has it: an odd pixel lies below and right
    if not isinstance(padding, str):
        before = _check.pair(op, "padding", padding, 0)
        total = [2 * each for each in before]
    axes = zip(x.shape[2:], total, spans, stride, strict=True)
    size = [(n + p - span - 1) // s + 1 for n, p, span, s in axes]
    if min(size) < 1 or 0 in x.shape[2:]:
        _check.fail(op, "kernel_size", f"fit into the padded image of x, {list(x.shape)}", kernel_size)
    if grad_output.shape[0] != x.shape[0] or list(grad_output.shape[2:]) != size:
        _check.fail(op, "grad_output", f"be [{x.shape[0]}, O, {size[0]}, {size[1]}]", grad_output)
    flag(op, "bias", bias)
    return x, grad_output, kernel_size, stride, before, dilation, groups, bias, records(op, x.shape[0], multiplicity)


def linear(op: str, x: Tensor, grad_output: Tensor, bias: bool, multiplicity: int) -> tuple[Any, ...]:
    """The arguments in the order of the ops' schema, with all positions of a row in one dimension."""
    signals(op, x, grad_output, 2)
    if grad_output.shape[:-1] != x.shape[:-1]:
        _check.fail(op, "grad_output", f"be [{', '.join(map(str, x.shape[:-1]))}, O]", grad_output)
    flag(op, "bias", bias)
    multiplicity = records(op, x.shape[0], multiplicity)
    return positions(x), positions(grad_output), bias, multiplicity


def group_norm(op: str, x: Tensor, grad_output: Tensor, groups: int, eps: float, multiplicity: int) -> tuple[Any, ...]:
    """The arguments in the order of the ops' schema."""
    signals(op, x, grad_output, 2)
    if grad_output.shape != x.shape:
        _check.fail(op, "grad_output", f"be {list(x.shape)}", grad_output)
    groups = _check.integer(op, "groups", groups, 1, 2**31)
    if x.shape[1] % groups:
        _check.fail(op, "groups", f"divide the {x.shape[1]} channels of x", groups)
    return x, grad_output, groups, epsilon(op, eps), records(op, x.shape[0], multiplicity)


def layer_norm(
    op: str,
    x: Tensor,
    grad_output: Tensor,
    normalized_shape: int | Sequence[int],
    eps: float,
    bias: bool,
    multiplicity: int,
) -> tuple[Any, ...]:
    """The arguments in the order of the ops' schema, with what is normalised together in the last of 3 dimensions."""
    signals(op, x, grad_output, 2)
    if grad_output.shape != x.shape:
        _check.fail(op, "grad_output", f"be {list(x.shape)}", grad_output)
    shape = [normalized_shape] if isinstance(normalized_shape, numbers.Integral) else normalized_shape
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        _check.fail(op, "normalized_shape", "be an int or a sequence of them", shape, TypeError)
    shape = [_check.integer(op, "normalized_shape", each, 0, 2**63) for each in shape]
    if not shape or len(shape) >= x.ndim or list(x.shape[x.ndim - len(shape) :]) != shape:
        _check.fail(op, "normalized_shape", f"be the last dimensions of x, {list(x.shape)}", normalized_shape)
    flag(op, "bias", bias)
    options = epsilon(op, eps), bias, records(op, x.shape[0], multiplicity)
    return *(positions(each, len(shape)) for each in (x, grad_output)), *options


def positions(value: Tensor, kept: int = 1) -> Tensor:
    """``[R, T, D]`` of ``[R, *, D]``, where D is what the last ``kept`` dimensions hold."""
    rows, between, last = value.shape[0], value.shape[1 : value.ndim - kept], value.shape[value.ndim - kept :]
    return value.reshape(rows, between.numel(), last.numel())
