"""The precision of a training step: float32, or bfloat16 for activations and products under torch's autocast.

Weights, their gradients, their moving average and the optimizer's state are float32 in both, as are the statistics of
norms and the loss. bfloat16 has the exponents of float32, so a loss is not scaled.
"""

import contextlib
import time
from collections.abc import Callable

import torch

from kr_fast.runtime.errors import fail

PRECISIONS = ("float32", "bfloat16")
FEWEST_STEPS = 4  # that are timed: the fastest of fewer was off by half on a busy machine


def check_precision(where: str, precision: str) -> None:
    """Raises: UserError unless ``precision`` is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        fail(where, "precision", "be 'float32' or 'bfloat16'", repr(precision))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """What the forward pass and the loss of a step in ``precision`` run in."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def has_amx() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in tiles (Intel AMX)."""
    return torch.cpu._is_amx_tile_supported()


def gain(make_step: Callable[[str], Callable[[], None]], seconds: float) -> float:
    """How many times as fast a step is in bfloat16 as in float32; takes about ``seconds``, more where 4 steps do.

    Args:
        make_step: precision -> a function that takes one step.
    """
    steps, times = [make_step(precision) for precision in PRECISIONS], ([], [])
    for step in steps:
        step()  # the library makes its kernels
    end = time.perf_counter() + seconds
    while len(times[0]) < FEWEST_STEPS or time.perf_counter() < end:
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])
