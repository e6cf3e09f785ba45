"""The threshold of best balanced accuracy, for every target left out."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import without_backward


def best_threshold(values: Tensor, members: Tensor, *, leave_out: bool = True) -> Tensor:
    """The threshold of largest ``TPR - FPR`` on the values of all models but one, for each of them.

    At or above it a value is taken for a member's; of several the highest. Rates are divided and subtracted in float64.

    Args:
        values: ``[n, M]`` float32 or float64, higher for members; infinities are ordered, NaN is refused.
        members: ``[n, M]`` bool, True for members.
        leave_out: False for one threshold on all models.
    Returns: float64 ``[M]`` or ``[1]`` on the device of ``values``, NaN where there are no members or no others.
    Raises: TypeError or ValueError naming the argument.
    """
    op = "best_threshold"
    _check.past_dispatcher(op, values=values)
    _check.tensor(op, "values", values, ndim=2, dtypes=(torch.float32, torch.float64))
    _check.tensor(op, "members", members, ndim=2, dtypes=(torch.bool,))
    if members.shape != values.shape:
        _check.fail(op, "members", f"have shape {list(values.shape)}", members)
    if bool(torch.isnan(values).any()):
        _check.fail(op, "values", "not hold NaN", f"{int(torch.isnan(values).sum())} NaN")
    run = registry.resolve(op, Call("cpu", torch.float64))
    thresholds = run(values.double().cpu().contiguous(), members.cpu().contiguous(), leave_out)
    return without_backward(op, thresholds.to(values.device), values)
