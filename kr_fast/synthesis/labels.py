"""Which class an image id has: a pure function of the id, never a random draw, so class counts are exact."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail
from kr_fast.runtime.reprs import ShortRepr


@dataclasses.dataclass(frozen=True, repr=False)
class LabelPlan(ShortRepr):
    """``labels(id) = pattern[id mod len(pattern)]``; ``count`` ids exist, or endlessly many if None."""

    pattern: Tensor
    num_classes: int
    count: int | None = None

    @classmethod
    def balanced(cls, num_classes: int, count: int | None = None) -> "LabelPlan":
        """Round robin: id ``i`` has class ``i mod num_classes``."""
        if num_classes < 1:
            fail("LabelPlan", "num_classes", "be at least 1", num_classes)
        return cls(torch.arange(num_classes), num_classes, count)

    @classmethod
    def counts(cls, counts: Sequence[int], count: int | None = None) -> "LabelPlan":
        """``counts[c]`` images of class ``c`` in every ``sum(counts)`` ids, spread evenly."""
        if not counts or min(counts) < 0 or sum(counts) == 0:
            fail("LabelPlan", "counts", "hold numbers >= 0 that do not sum to 0", list(counts))
        sizes = torch.tensor(counts)
        labels = torch.repeat_interleave(torch.arange(len(counts)), sizes)
        # The j-th of n_c images stands at (j + 1/2) / n_c; ties by class.
        start = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        place = (torch.arange(len(labels)) - start + 0.5).double() / sizes[labels]
        return cls(labels[torch.sort(place, stable=True).indices], len(counts), count)

    @classmethod
    def explicit(cls, labels: Tensor) -> "LabelPlan":
        """Id ``i`` has class ``labels[i]``; other ids do not exist."""
        if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) == 0 or labels.min() < 0:
            fail("LabelPlan", "labels", "be a non-empty int64 [N] tensor of classes >= 0", list(labels.shape))
        return cls(labels, int(labels.max()) + 1, len(labels))

    def labels(self, ids: Tensor) -> Tensor:
        """int64 ``[B]`` ids -> int64 ``[B]`` classes."""
        if len(ids) and (ids.min() < 0 or (self.count is not None and ids.max() >= self.count)):
            high = "2^63" if self.count is None else self.count
            fail("LabelPlan", "ids", f"lie in [0, {high})", f"[{int(ids.min())}, {int(ids.max())}]")
        return self.pattern.to(ids.device)[ids % len(self.pattern)]

    def describe(self) -> dict[str, Any]:
        """The plan as plain values, its pattern by SHA-256: equal for plans that give equal labels to equal ids."""
        pattern = self.pattern.cpu().contiguous().numpy().astype("<i8")
        return {
            "num_classes": self.num_classes,
            "count": self.count,
            "period": len(pattern),
            "pattern": hashlib.sha256(pattern.tobytes()).hexdigest(),
        }
