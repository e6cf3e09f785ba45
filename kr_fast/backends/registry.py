"""Which kernel runs an op: one predicate per (op, backend), which is both the dispatch test and the error text.

``KR_FAST_BACKEND=reference|cpu|cuda|triton`` forces one backend; a forced backend that cannot run raises and says why.
Otherwise the first backend in the order of preference that does not refuse is taken. Ending at ``reference`` because a
compiled kernel refused costs speed, so it is logged once per reason on the logger ``kr_fast``.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from kr_fast.backends.calls import Call, call_of

BACKENDS = ("reference", "cpu", "cuda", "triton")
# An op without a row takes the row "*".
PREFERENCE: dict[tuple[str, str], tuple[str, ...]] = {
    ("*", "cpu"): ("cpu", "reference"),
    ("*", "cuda"): ("cuda", "triton", "reference"),
    ("model_conv2d", "cpu"): ("reference",),  # models are not batched on a CPU, see docs/design/model_array.md
    ("model_conv2d_backward", "cpu"): ("reference",),
    ("model_batch_norm", "cpu"): ("reference",),
    ("model_residual_block", "cpu"): ("reference",),
    ("model_sgd", "cpu"): ("reference",),
}
_log = logging.getLogger("kr_fast")
_kernels: dict[tuple[str, str], tuple[Callable, Callable]] = {}
_unavailable: dict[str, str] = {}
_forced: str | None = os.environ.get("KR_FAST_BACKEND") or None


def kernel(op: str, backend: str, *, refuses: Callable[[Call], str | None]) -> Callable:
    """Register the decorated function as ``op`` on ``backend``.

    ``refuses(call)`` returns why such a call, of the op's type in :mod:`.calls`, cannot run there, or None.
    """

    def add(function: Callable) -> Callable:
        _kernels[op, backend] = (_as_given(function) if backend == "reference" else function, refuses)
        return function

    return add


def never(call: Call) -> None:
    """The predicate of a kernel that runs every call."""


class Differentiable(NamedTuple):
    """An op whose kernel has a forward and a backward half, and perhaps one that does both in one pass.

    ``forward_backward`` returns the result, the gradient where the upstream gradient is 1, and the factor that
    backward takes or None. ``rescale_grad`` makes such a gradient right in place, on a device whose upstream gradient
    cannot be read without a wait.
    """

    forward: Callable
    backward: Callable | None  # None where the kernel refuses calls that train
    forward_backward: Callable | None = None
    rescale_grad: Callable | None = None


def differentiable(op: str, backend: str, kernels: Differentiable, *, refuses: Callable[[Call], str | None]) -> None:
    """Register the halves of ``op`` on ``backend``."""
    if backend == "reference":
        kernels = Differentiable(*(each and _as_given(each) for each in kernels))
    _kernels[op, backend] = (kernels, refuses)


def _as_given(function: Callable) -> Callable:
    """``function`` of torch's operations in the dtypes of its arguments, as kernels compute: autocast changes none."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*arguments, **options)

    return run


@contextlib.contextmanager
def added(op: str, backend: str, function: Callable) -> Iterator[None]:
    """Within the ``with`` block ``function`` runs every call of ``op`` on ``backend``, of which it is a trial."""
    before, why = _kernels.get((op, backend)), unavailable(backend)
    _kernels[op, backend] = (function, never)
    mark_unavailable(backend, None)
    try:
        yield
    finally:
        if before is None:
            del _kernels[op, backend]
        else:
            _kernels[op, backend] = before
        mark_unavailable(backend, why)


def mark_unavailable(backend: str, reason: str | None) -> None:
    """Note that a whole backend cannot run here: its kernels then refuse with ``reason``. None takes it back."""
    if reason is None:
        _unavailable.pop(backend, None)
    else:
        _unavailable[backend] = reason
    choose_again()


def choose_again() -> None:
    """Forget which kernel runs which call, after a change of :data:`PREFERENCE`."""
    _resolve.cache_clear()
    _warn.cache_clear()
    _has_kernel.cache_clear()


def unavailable(backend: str) -> str | None:
    """Why a whole backend cannot run here, or None."""
    return _unavailable.get(backend)


def refusal(op: str, backend: str, call: Call) -> str | None:
    """Why ``backend`` cannot run ``op`` for such a call, or None if it can."""
    if backend in _unavailable:
        return _unavailable[backend]
    if (op, backend) not in _kernels:
        return f"{op} has no {backend} kernel"
    return _kernels[op, backend][1](call)


def resolve(op: str, call: Call) -> Callable:
    """The function that runs such a call of ``op``.

    Raises:
        RuntimeError: if the forced backend cannot run it, or none can.
    """
    return _resolve(op, call, _forced)


def runs_preferred(op: str, call: Call) -> bool:
    """Whether the first choice among the backends, or the forced one, runs such a call."""
    return refusal(op, _forced or preference(op, call.device)[0], call) is None


def device_for(op: str, device: torch.device, call: Call) -> torch.device:
    """Where such a call is best computed: on ``device`` if a kernel runs there, else on the CPU.

    For ops whose arguments and results are small beside the work: a copy to the C++ kernel beats the reference.
    """
    if device.type == "cpu" or _forced not in (None, "cpu"):
        return device
    return device if _forced is None and _has_kernel(op, call) else torch.device("cpu")


@functools.lru_cache(maxsize=4096)
def _has_kernel(op: str, call: Call) -> bool:
    compiled = (backend for backend in preference(op, call.device) if backend != "reference")
    reasons = {backend: refusal(op, backend, call) for backend in compiled}
    if None in reasons.values():
        return True
    why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    _log.warning("%s is computed on the cpu: %s", op, why or f"no kernel for {call.device}")
    return False


def preference(op: str, device: str) -> tuple[str, ...]:
    """The backends that may run ``op`` on a type of device, best first."""
    return PREFERENCE.get((op, device)) or PREFERENCE.get(("*", device), ("reference",))


@functools.lru_cache(maxsize=4096)
def _resolve(op: str, call: Call, forced: str | None) -> Callable:
    check(forced)
    if forced is not None:
        why = refusal(op, forced, call)
        if why is not None:
            raise RuntimeError(f"{op}: KR_FAST_BACKEND={forced} cannot run this call: {why}")
        return _kernels[op, forced][0]
    reasons, absent = [], True
    for backend in preference(op, call.device):
        why = refusal(op, backend, call)
        if why is None:
            if backend == "reference" and reasons:  # what holds for every op is told once
                _warn("every op" if absent else op, "; ".join(reasons))
            return _kernels[op, backend][0]
        reasons.append(f"{backend}: {why}")
        absent = absent and backend in _unavailable
    raise RuntimeError(f"{op}: no backend can run this call: {'; '.join(reasons)}")


@functools.lru_cache(maxsize=4096)
def _warn(op: str, reasons: str) -> None:
    _log.warning("%s runs on the slow reference backend: %s", op, reasons)


def force(backend: str | None) -> None:
    """Force one backend for all ops from now on, or None for the automatic choice."""
    global _forced
    check(backend)
    _forced = backend


def check(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or one of :data:`BACKENDS`."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"KR_FAST_BACKEND must be one of {', '.join(BACKENDS)}, got {backend}")


def check_environment() -> None:
    """:func:`check` of ``KR_FAST_BACKEND``, which is read on import, where an error would name no call."""
    check(_forced)


@contextlib.contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Within the ``with`` block, as :func:`force`."""
    before = _forced
    force(backend)
    try:
        yield
    finally:
        force(before)


def ops() -> list[str]:
    """Every op that has a kernel, sorted."""
    return sorted({op for op, _ in _kernels})


def has(op: str, backend: str) -> bool:
    """Whether ``op`` has a kernel on ``backend``, whatever this machine can run."""
    return (op, backend) in _kernels


def table() -> list[tuple[str, dict[str, str]]]:
    """(op, {backend: "available", perhaps in another dtype alone, or the reason for float32}) on this machine."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    others = {torch.float16: "half precision", torch.float64: "float64"}
    rows = []
    for op in ops():
        device = {"reference": "cpu", "cpu": "cpu", "cuda": gpu, "triton": gpu}
        cells = {}
        for name in BACKENDS:
            why = refusal(op, name, call_of(op, device[name], torch.float32))
            taken = [
                text for dtype, text in others.items() if refusal(op, name, call_of(op, device[name], dtype)) is None
            ]
            cells[name] = f"available in {taken[0]}" if why and taken else why or "available"
        rows.append((op, cells))
    return rows
