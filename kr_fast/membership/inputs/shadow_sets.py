"""Shadows' signals with one target left out: what the attacks share."""

from typing import Any

import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_mask, described


def taken(where: str, signal: Any, keep: Any, target: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """(signals, keep, target) as every attack on shadows needs them: tensors that fit each other, without NaN."""
    signal, keep = as_numbers(where, "signals", signal), as_mask(where, "keep", keep, 2)
    target = None if target is None else as_numbers(where, "target", target)
    if signal.ndim != 3 or 0 in signal.shape:
        fail(where, "signals", "be float [A, N, M], none of them 0", described(signal))
    if keep.shape != (signal.shape[2], signal.shape[1]):
        fail(where, "keep", f"have shape [M, N] = [{signal.shape[2]}, {signal.shape[1]}]", list(keep.shape))
    if signal.shape[2] < 2:
        fail(where, "signals", "hold at least 2 shadows", signal.shape[2])
    if target is not None and (target.ndim != 3 or target.shape[:2] != signal.shape[:2]):
        fail(where, "target", f"have shape [{signal.shape[0]}, {signal.shape[1]}, K]", list(target.shape))
    for name, value in (("signals", signal), ("target", target)):
        if value is not None and bool(torch.isnan(value).any()):
            fail(where, name, "not hold NaN", f"{int(torch.isnan(value).sum())} NaN")
    return signal, keep, target


def population_of(where: str, name: str, value: Any, queries: int, models: int, count: int | None = None) -> Tensor:
    """A population's signals ``[A, Z, M]`` with Z > 0 (``count``, where it is known), without NaN."""
    signals = as_numbers(where, name, value)
    size = signals.shape[1] if signals.ndim == 3 else 0
    if size == 0 or signals.shape[::2] != (queries, models) or size != (count or size):
        fail(where, name, f"have shape [{queries}, {count or 'Z'}, {models}]", list(signals.shape))
    if bool(torch.isnan(signals).any()):
        fail(where, name, "not hold NaN", f"{int(torch.isnan(signals).sum())} NaN")
    return signals


def by_model(values: Tensor) -> Tensor:
    """``[A, N, K]`` as ``[K, A, N]``: what is read model by model then lies together."""
    return values.permute(2, 0, 1).contiguous()


class ShadowStatistics:
    """Means over the shadows of each side, the target left out in O(1), and with it its partner where there are any.

    Args:
        values: float64 ``[A, N, M]``; keep: ``[M, N]``; target: ``[A, N, K]``, or None for leave-one-out.
        partner: see :func:`kr_fast.membership.statistics.balanced.partners`; only for leave-one-out.
    """

    def __init__(self, values: Tensor, keep: Tensor, target: Tensor | None, partner: Tensor | None = None):
        held = keep.T.to(values.dtype)
        self.sums = (values * held).sum(2), (values * (1 - held)).sum(2)
        self.counts, self.models = (keep.sum(0), (~keep).sum(0)), values.shape[2]
        self.keep, self.leave_out, self.partner = keep, target is None, partner
        self.own = by_model(values if target is None else target)

    @property
    def targets(self) -> int:
        """How many models are scored."""
        return len(self.own)

    def value(self, k: int) -> Tensor:
        """``[A, N]`` of target ``k``."""
        return self.own[k]

    def left(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Side in and side out: (sum ``[A, N]``, count ``[N]``) of what is not left out with target ``k``."""
        sides = list(zip(self.sums, self.counts, strict=True))
        if self.leave_out:
            gone = [(self.keep[k], torch.ones_like(self.keep[k]), self.own[k])]
            if self.partner is not None:
                index = self.partner[k]
                value = self.own.gather(0, index.clamp_min(0).expand(1, *self.own.shape[1:]))[0]
                gone.append((~self.keep[k], index >= 0, value))
            for inside, there, value in gone:
                for side, on in enumerate((inside & there, ~inside & there)):
                    total, count = sides[side]
                    sides[side] = total - torch.where(on, value, 0.0), count - on.long()
        return [(total.clamp_min(0), count) for total, count in sides]

    def means(self, k: int) -> tuple[Tensor, Tensor]:
        """(mean in, mean out) ``[A, N]``; NaN where no shadow is left on the side."""
        inside, outside = (torch.where(count > 0, total / count, torch.nan) for total, count in self.left(k))
        return inside, outside

    def mean_all(self, k: int) -> Tensor:
        """Mean of all shadows that are not left out."""
        (total, count), (other, others) = self.left(k)
        return (total + other) / (count + others)

    def lacks(self, k: int) -> Tensor:
        """``[N]``: a side has no shadow."""
        inside, outside = (count == 0 for _, count in self.left(k))
        return inside | outside
