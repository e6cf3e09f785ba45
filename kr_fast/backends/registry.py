"""Which kernel runs an op: one predicate per (op, backend), which is both the dispatch test and the error text.

``KR_FAST_BACKEND=reference|cpu|cuda|triton`` forces one backend; a forced backend that cannot run raises and says why.
Otherwise the first backend in the order of preference that does not refuse is taken. Ending at ``reference`` because a
compiled kernel refused costs speed, so it is told once per reason on the logger ``kr_fast``.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

BACKENDS = ("reference", "cpu", "cuda", "triton")
# By measurement where there is one, see docs/backends.md; an op without a row takes the row "*".
PREFERENCE: dict[tuple[str, str], tuple[str, ...]] = {
    ("*", "cpu"): ("cpu", "reference"),
    ("*", "cuda"): ("cuda", "triton", "reference"),
    ("model_conv2d", "cpu"): ("reference",),  # models are not batched on a CPU, see docs/model_array.md
    ("model_conv2d_backward", "cpu"): ("reference",),
    ("model_batch_norm", "cpu"): ("reference",),
    ("model_residual_block", "cpu"): ("reference",),
    ("model_sgd", "cpu"): ("reference",),
}
# Between the kernels of a GPU: (op, sizes that decide the regime, dtypes or () for all, least compute capability,
# order). The first row that fits comes before PREFERENCE. Not measured yet: the order follows from what each kernel
# reads and launches, see docs/backends.md.
CHOICES: tuple[tuple[str, range, tuple[torch.dtype, ...], tuple[int, int], tuple[str, ...]], ...] = (
    ("distillation_loss", range(2, 2**28), (), (8, 0), ("cuda", "triton", "reference")),
    ("distillation_loss", range(2, 2**28), (), (0, 0), ("triton", "cuda", "reference")),
)
_log = logging.getLogger("kr_fast")
Size = int | tuple[int, ...]  # what decides a kernel's regime, as a loss's class count; 0 where there is nothing such
_kernels: dict[tuple[str, str], tuple[Callable, Callable]] = {}
_unavailable: dict[str, str] = {}
_forced: str | None = os.environ.get("KR_FAST_BACKEND") or None


def kernel(op: str, backend: str, *, refuses: Callable[[str, torch.dtype, Size], str | None]) -> Callable:
    """Register the decorated function as ``op`` on ``backend``.

    ``refuses(device_type, dtype, size)`` returns why the call cannot run there, or None.
    """

    def add(function: Callable) -> Callable:
        _kernels[op, backend] = (function, refuses)
        return function

    return add


def never(device: str, dtype: torch.dtype, size: Size) -> None:
    """The predicate of a kernel that runs every call."""


class TwoWay(NamedTuple):
    """An op whose kernel has a forward and a backward half, and perhaps one that does both in one pass.

    ``both`` returns the result, the gradient where the upstream gradient is 1, and the factor that backward takes or
    None. ``amend`` makes such a gradient right in place, on a device whose upstream gradient cannot be read without a
    wait.
    """

    forward: Callable
    backward: Callable
    both: Callable | None = None
    amend: Callable | None = None


def two_way(
    op: str, backend: str, forward: Callable, backward: Callable, both: Callable | None = None,
    amend: Callable | None = None, *, refuses: Callable,
) -> None:  # fmt: skip
    """Register the halves of ``op`` on ``backend``."""
    _kernels[op, backend] = (TwoWay(forward, backward, both, amend), refuses)


def mark_unavailable(backend: str, reason: str | None) -> None:
    """Note that a whole backend cannot run here: its kernels then refuse with ``reason``. None takes it back."""
    if reason is None:
        _unavailable.pop(backend, None)
    else:
        _unavailable[backend] = reason
    _resolve.cache_clear()
    _has_kernel.cache_clear()


def unavailable(backend: str) -> str | None:
    """Why a whole backend cannot run here, or None."""
    return _unavailable.get(backend)


def refusal(op: str, backend: str, device: str, dtype: torch.dtype, size: Size = 0) -> str | None:
    """Why ``backend`` cannot run ``op`` for such tensors, or None if it can."""
    if backend in _unavailable:
        return _unavailable[backend]
    if (op, backend) not in _kernels:
        return f"{op} has no {backend} kernel"
    return _kernels[op, backend][1](device, dtype, size)


def resolve(op: str, device: str, dtype: torch.dtype, size: Size = 0) -> Callable:
    """The function that runs ``op`` for tensors of this device type and dtype.

    Raises:
        RuntimeError: if the forced backend cannot run it, or none can.
    """
    return _resolve(op, device, dtype, size, _forced)


def at_its_best(op: str, device: str, dtype: torch.dtype, size: Size = 0) -> bool:
    """Whether the first choice among the backends, or the forced one, runs such a call."""
    order = preference(op, device, dtype, size, _capability() if device == "cuda" else (0, 0))
    return refusal(op, _forced or order[0], device, dtype, size) is None


def nearest(op: str, device: torch.device, dtype: torch.dtype, size: Size = 0) -> torch.device:
    """Where such a call is best computed: on ``device`` if a kernel runs there, else on the CPU.

    For ops whose arguments and results are small beside the work: a copy to the C++ kernel beats the reference.
    """
    if device.type == "cpu" or _forced not in (None, "cpu"):
        return device
    return device if _forced is None and _has_kernel(op, device.type, dtype, size) else torch.device("cpu")


@functools.lru_cache(maxsize=4096)
def _has_kernel(op: str, device: str, dtype: torch.dtype, size: Size) -> bool:
    order = preference(op, device, dtype, size, _capability() if device == "cuda" else (0, 0))
    reasons = {backend: refusal(op, backend, device, dtype, size) for backend in order if backend != "reference"}
    if None in reasons.values():
        return True
    told = "; ".join(f"{backend}: {why}" for backend, why in reasons.items())
    _log.warning("%s is computed on the cpu: %s", op, told or f"no kernel for {device}")
    return False


def preference(op: str, device: str, dtype: torch.dtype, size: Size, capability: tuple[int, int]) -> tuple[str, ...]:
    """The backends that may run such a call, best first."""
    if device == "cuda":
        for name, sizes, dtypes, least, order in CHOICES:
            if name == op and size in sizes and (not dtypes or dtype in dtypes) and capability >= least:
                return order
    return PREFERENCE.get((op, device)) or PREFERENCE.get(("*", device), ("reference",))


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@functools.lru_cache(maxsize=4096)
def _resolve(op: str, device: str, dtype: torch.dtype, size: Size, forced: str | None) -> Callable:
    check(forced)
    if forced is not None:
        why = refusal(op, forced, device, dtype, size)
        if why is not None:
            raise RuntimeError(f"{op}: KR_FAST_BACKEND={forced} cannot run this call: {why}")
        return _kernels[op, forced][0]
    reasons = []
    for backend in preference(op, device, dtype, size, _capability() if device == "cuda" else (0, 0)):
        why = refusal(op, backend, device, dtype, size)
        if why is None:
            if backend == "reference" and reasons:
                _log.warning("%s runs on the slow reference backend: %s", op, "; ".join(reasons))
            return _kernels[op, backend][0]
        reasons.append(f"{backend}: {why}")
    raise RuntimeError(f"{op}: no backend can run this call: {'; '.join(reasons)}")


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
    """(op, {backend: "available", also in half precision alone, or the reason for float32}) on this machine."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in ops():
        device = {"reference": "cpu", "cpu": "cpu", "cuda": gpu, "triton": gpu}
        cells = {}
        for name in BACKENDS:
            why = refusal(op, name, device[name], torch.float32)
            half = why and refusal(op, name, device[name], torch.float16) is None
            cells[name] = "available in half precision" if half else why or "available"
        rows.append((op, cells))
    return rows
