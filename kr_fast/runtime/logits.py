"""Whether rows are logits, or probabilities or hard labels, by their values."""

import torch
from torch import Tensor

TOLERANCE, HALF = 1e-3, 2**-8  # of the sum of probabilities, and of those in bfloat16
HALVES, DECIMALS = (torch.float16, torch.bfloat16), range(1, 7)


def not_logits(rows: Tensor) -> str | None:
    """What ``rows`` ``[n, C]`` are, if all of them are probabilities or hard labels.

    Probabilities lie in [0, 1] and sum to 1 (percentages to 100), within the rounding of their dtype; if all are of
    half precision, within the rounding of that; if all are rounded to ``d`` decimals, within ``C / 2`` units of the
    last decimal more. Hard labels are one-hot, or have one value for the class and another for all others (of three
    classes or more). Log-probabilities are logits: softmax does not change them.
    """
    if rows.shape[-1] < 2:
        return None
    values = rows.double()
    largest = values.amax(-1, keepdim=True)
    for total in (1, 100):
        if not bool((values >= 0).all() & (values <= total * (1 + HALF)).all()):
            continue
        if total == 100 and bool((values <= 1 + HALF).all()):  # a hundred sigmoids near 1 sum to 100 too
            continue
        deviation = (values.sum(-1) / total - 1).abs()
        half = any(bool((rows.to(dtype).double() == values).all()) for dtype in HALVES)
        tolerance = HALF if half and total == 1 else TOLERANCE
        if bool((deviation < tolerance).all()):
            return f"rows that are >= 0 and sum to {total}"
        # Zeros and ones alone do not show any rounding.
        decimals = next((d for d in DECIMALS if _rounded(rows, d)), 0) if bool((values % 1 != 0).any()) else 0
        if decimals and bool((deviation <= tolerance + 0.5 * 10.0**-decimals * rows.shape[-1] / total).all()):
            return f"rows of probabilities, rounded to {decimals} decimal{'s' if decimals > 1 else ''}"
    if rows.shape[-1] > 2 and bool(((values == largest).sum(-1) == 1).all()):
        others = values.masked_fill(values == largest, torch.inf).amin(-1)
        second = values.masked_fill(values == largest, -torch.inf).amax(-1)
        same = bool((others == second).all()) and len(second.unique()) == 1 == len(largest.unique())
        if same and len(values.argmax(-1).unique()) > 1:
            return "rows of hard labels: one value for the class, one for all others"
    return None


def _rounded(rows: Tensor, decimals: int) -> bool:
    """Whether every number is the nearest of its type, or of a half-precision type, to one with so many decimals."""
    values = rows.double()
    near = torch.round(values, decimals=decimals)
    return any(bool((near.to(dtype).double() == values).all()) for dtype in (rows.dtype, *HALVES))
