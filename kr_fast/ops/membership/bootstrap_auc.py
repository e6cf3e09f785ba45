"""Bootstrap replicates of AUC and TPR from the counts at each distinct score: one sort serves all of them."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check


def bootstrap_auc(
    inside: Tensor, outside: Tensor, limits: Tensor, *, replicates: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(AUC float64 ``[B]``, true positives int64 ``[B, K]``) of resampled data.

    Each replicate draws as many members as there are, with replacement, and as many non-members. Draw ``i`` of
    replicate ``b`` is item ``floor(n w / 2^32)`` with ``w`` word ``i % 4`` of Philox4x32-10 at counter
    ``(i // 4, side, b, 0)``, side 0 for members: the same draws on every machine. (An item is favoured by at most
    n / 2^32.) True positives are the most that can be had with at most ``limits[k]`` false positives.

    Args:
        inside, outside: int64 ``[G]``, members and non-members at each distinct score from high to low.
        limits: int64 ``[K]``, ascending, >= 0.
        replicates: B >= 1.
        seed: key of the draws, in [0, 2^64).
    Raises: TypeError or ValueError naming the argument.
    """
    op = "bootstrap_auc"
    for name, value in (("inside", inside), ("outside", outside), ("limits", limits)):
        _check.tensor(op, name, value, ndim=1, dtypes=(torch.int64,))
        if value.numel() and int(value.min()) < 0:
            _check.fail(op, name, "be >= 0", int(value.min()))
    if len(inside) != len(outside):
        _check.fail(op, "outside", f"have shape [{len(inside)}]", outside)
    for name, value in (("inside", inside), ("outside", outside)):
        if not 0 < int(value.sum()) < 2**31:
            _check.fail(op, name, "count 1 to 2^31 - 1 examples", int(value.sum()))
    if len(limits) and bool((limits.diff() < 0).any()):
        _check.fail(op, "limits", "be ascending", limits.tolist())
    replicates = _check.integer(op, "replicates", replicates, 1, 2**31)
    seed = _check.integer(op, "seed", seed, 0, 2**64)
    run = registry.resolve(op, Call("cpu", torch.float64))
    return run(*(value.contiguous().cpu() for value in (inside, outside, limits)), replicates, seed)
