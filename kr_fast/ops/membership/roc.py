"""The exact ROC points of membership scores."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import without_backward


def roc(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(thresholds float64, tp int64, fp int64) at each distinct score, from high to low.

    ``tp`` and ``fp`` count members and non-members with a score at or above the threshold: tied scores are one point.

    Args:
        scores: ``[N]`` float, higher for members; infinities are ordered, NaN is refused.
        members: ``[N]`` bool, with at least one True and one False.
    Raises: TypeError or ValueError naming the argument.
    """
    op = "roc"
    _check.past_dispatcher(op, scores=scores)
    _check.tensor(op, "scores", scores, ndim=1)
    _check.tensor(op, "members", members, ndim=1, dtypes=(torch.bool,))
    if len(scores) != len(members):
        _check.fail(op, "members", f"have one entry for each of the {len(scores)} scores", members)
    inside = int(members.sum())
    if inside == 0 or inside == len(members):
        _check.fail(op, "members", "hold members and non-members", f"{inside} of {len(members)} members")
    if bool(torch.isnan(scores).any()):
        _check.fail(op, "scores", "not hold NaN", f"{int(torch.isnan(scores).sum())} NaN")
    run = registry.resolve(op, Call("cpu", torch.float64))
    thresholds, tp, fp = run(scores.double().contiguous().cpu(), members.contiguous().cpu())
    return without_backward(op, thresholds, scores), tp, fp
