"""Argument errors in one form: ``op: argument must RULE, got VALUE``."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kr_fast.backends import codes
from kr_fast.ops._library import refuse_tangents

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
COMPILED = tuple(codes.DTYPES)  # the dtypes of which compiled kernels exist
FLOATING = (*COMPILED, torch.float64)  # float64 runs on the reference backend
# Its inductor drops a copy to channels_last before an op of another library, whose numbers are then wrong in silence.
LOSES_LAYOUTS = torch.__version__.startswith("2.6.")


def describe(value: Any) -> str:
    """A tensor as dtype, shape and device; anything else as it prints, shortened."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fail(op: str, argument: str, rule: str, value: Any, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` in the package's form."""
    raise error(f"{op}: {argument} must {rule}, got {describe(value)}")


def tensor(op: str, argument: str, value: Any, *, ndim: int | None = None, dtypes: tuple = ()) -> None:
    """``value`` is a tensor of ``ndim`` dimensions and one of ``dtypes``."""
    if not isinstance(value, Tensor):
        fail(op, argument, "be a tensor", value, TypeError)
    if dtypes and value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        fail(op, argument, f"be {names}", value, TypeError)
    if ndim is not None and value.ndim != ndim:
        fail(op, argument, f"have {ndim} dimensions", value)


def operand(
    op: str, argument: str, value: Any, shape: Sequence[int], *, like: Tensor, dtypes: tuple, contiguous: bool = True
) -> None:
    """``value`` is a tensor of ``shape`` and one of ``dtypes``, on the device of ``like``, contiguous if so asked."""
    fits = isinstance(value, Tensor) and value.dtype in dtypes and value.shape == shape
    if fits and value.device == like.device and (not contiguous or value.is_contiguous()):
        return
    tensor(op, argument, value, ndim=len(shape), dtypes=dtypes)
    fail(op, argument, f"be {'contiguous ' if contiguous else ''}{list(shape)} on {like.device}", value)


def integer(op: str, argument: str, value: Any, low: int, high: int) -> int:
    """``value``, an integer of Python or numpy, as an int in [low, high)."""
    if type(value) is int and low <= value < high:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        fail(op, argument, "be an int", value, TypeError)
    if not low <= value < high:
        fail(op, argument, f"be in [{low}, {high})", value)
    return int(value)


def pair(op: str, argument: str, value: int | Sequence[int], low: int) -> tuple[int, int]:
    """One integer, or a vertical and a horizontal one, as two of at least ``low``."""
    if type(value) is int and value >= low:
        return value, value
    value = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        fail(op, argument, "be an int or a pair of them", value, TypeError)
    return tuple(integer(op, argument, each, low, 2**31) for each in value)


def integers(op: str, argument: str, value: Tensor) -> Tensor:
    """``value`` as int64, contiguous, from any integer dtype."""
    if isinstance(value, Tensor) and value.dtype == torch.int64:
        return value if value.is_contiguous() else value.contiguous()
    tensor(op, argument, value)
    if value.dtype not in INTEGERS:
        fail(op, argument, "be int64 or another integer dtype", value, TypeError)
    return value.to(torch.int64).contiguous()


def labels(op: str, value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Class labels of ``shape``, or ``[*shape, 1]``, as int64 of ``shape``, contiguous."""
    checked = integers(op, "labels", value)
    if checked.shape == (*shape, 1):
        checked = checked[..., 0]
    if checked.shape != shape or checked.device != device:
        fail(op, "labels", f"be {list(shape)} on {device}", value)
    return checked


def ids(op: str, value: Tensor | None) -> None:
    """Image ids, if there are any, are at least 0. Not read on a GPU, where it would be a wait."""
    if value is not None and value.device.type == "cpu" and value.numel() and int(value.amin()) < 0:
        fail(op, "ids", "be at least 0", int(value.amin()))


def contiguous(op: str, argument: str, value: Tensor) -> None:
    """``value`` lies in memory in the order of its dimensions, without gaps."""
    if not value.is_contiguous():
        fail(op, argument, "be contiguous", f"{describe(value)} with strides {value.stride()}")


def channels_last(op: str, argument: str, value: Any, *, dtypes: tuple) -> None:
    """``value`` is ``[N, C, H, W]`` of one of ``dtypes`` and has its channels innermost, without gaps."""
    fits = isinstance(value, Tensor) and value.dtype in dtypes and value.ndim == 4
    if LOSES_LAYOUTS and torch.compiler.is_compiling():
        fail(op, "torch", "be 2.7 or newer where an op in channels_last is compiled", torch.__version__)
    if fits and value.is_contiguous(memory_format=torch.channels_last):
        return
    tensor(op, argument, value, ndim=4, dtypes=dtypes)
    fail(op, argument, "be channels_last", f"{describe(value)} with strides {value.stride()}")


def no_grad(op: str, **inputs: Tensor | None) -> None:
    """None of ``inputs`` requires grad while grad mode is on: the op has no backward."""
    if torch.is_grad_enabled():
        for name, value in inputs.items():
            if value is not None and value.requires_grad:
                fail(op, name, "not require grad outside torch.no_grad() (there is no backward)", value)


def no_transform(op: str, **inputs: Tensor | None) -> None:
    """The op is not called under ``torch.func``, whose tensors have no address, nor for tangents."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{op}: the call must not be under torch.func (vmap, grad, jvp); "
            "flatten the batch to [B * N, C] and use autograd"
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(op, inputs)


def past_dispatcher(op: str, **inputs: Tensor | None) -> None:
    """As :func:`no_transform`, for ops of which ``torch.jit.trace`` would record nothing."""
    no_trace(op)
    no_transform(op, **inputs)


def no_trace(op: str) -> None:
    """The op is not called under ``torch.jit.trace``."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(f"{op}: the call must not be under torch.jit.trace; use torch.export or torch.compile")
