"""Shadows' signals with one target left out: what the attacks share."""

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail


def check(where: str, signal: Tensor, keep: Tensor, target: Tensor | None) -> None:
    """Shapes, a boolean keep and no NaN, as every attack on shadows needs them."""
    if signal.ndim != 3 or not signal.dtype.is_floating_point or 0 in signal.shape:
        fail(where, "signals", "be float [A, N, M], none of them 0", f"{signal.dtype} {list(signal.shape)}")
    if keep.dtype != torch.bool:
        fail(where, "keep", "be bool", keep.dtype)
    if keep.shape != (signal.shape[2], signal.shape[1]):
        fail(where, "keep", f"have shape [M, N] = [{signal.shape[2]}, {signal.shape[1]}]", list(keep.shape))
    if signal.shape[2] < 2:
        fail(where, "signals", "hold at least 2 shadows", signal.shape[2])
    if target is not None and (target.ndim != 3 or target.shape[:2] != signal.shape[:2]):
        fail(where, "target", f"have shape [{signal.shape[0]}, {signal.shape[1]}, K]", list(target.shape))
    for name, value in (("signals", signal), ("target", target)):
        if value is not None and bool(torch.isnan(value).any()):
            fail(where, name, "not hold NaN", f"{int(torch.isnan(value).sum())} NaN")


class Shadowed:
    """Means over the shadows of each side, the target left out in O(1).

    Args:
        values: float64 ``[A, N, M]``; keep: ``[M, N]``; target: ``[A, N, K]``, or None for leave-one-out.
    """

    def __init__(self, values: Tensor, keep: Tensor, target: Tensor | None):
        self.values, self.keep, self.target = values, keep, target
        held = keep.T.to(values.dtype)
        self.sums = (values * held).sum(2), (values * (1 - held)).sum(2)
        self.counts = keep.sum(0), (~keep).sum(0)

    @property
    def targets(self) -> int:
        """How many models are scored."""
        return (self.values if self.target is None else self.target).shape[2]

    def value(self, k: int) -> Tensor:
        """``[A, N]`` of target ``k``."""
        return (self.values if self.target is None else self.target)[:, :, k]

    def means(self, k: int) -> tuple[Tensor, Tensor]:
        """(mean in, mean out) ``[A, N]``; NaN where no shadow is left on the side."""
        found = []
        for total, count, side in zip(self.sums, self.counts, (True, False), strict=True):
            if self.target is None:
                own = self.keep[k] == side
                total, count = total - torch.where(own, self.values[:, :, k], 0.0), count - own.long()
            found.append(torch.where(count > 0, total.clamp_min(0) / count, torch.nan))
        return found[0], found[1]

    def mean_all(self, k: int) -> Tensor:
        """Mean of all shadows but the target."""
        models, total = self.values.shape[2], self.sums[0] + self.sums[1]
        if self.target is None:
            return (total - self.values[:, :, k]).clamp_min(0) / (models - 1)
        return total / models

    def lacks(self, k: int) -> Tensor:
        """``[N]``: a side has no shadow."""
        own = self.keep[k] if self.target is None else None
        inside, outside = self.counts
        if own is not None:
            inside, outside = inside - own.long(), outside - (~own).long()
        return (inside == 0) | (outside == 0)
