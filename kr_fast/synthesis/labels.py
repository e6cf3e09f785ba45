"""Which class an image id has: a pure function of the id, never a random draw, so class counts are exact."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer, as_labels, described
from kr_fast.runtime.reprs import ShortRepr

MOST_CLASSES, LONGEST = 10**6, 10**8  # the pattern lies in memory


@dataclasses.dataclass(frozen=True, repr=False)
class LabelPlan(ShortRepr):
    """``labels(id) = pattern[id mod len(pattern)]``; ``count`` ids exist, or endlessly many if None.

    Args:
        pattern: integers ``[P]`` in [0, num_classes), a tensor, a numpy array or a list; kept as int64.
        num_classes: 1 to 1,000,000.
        count: at least 1, or None.
    Raises: UserError naming the argument.
    """

    pattern: Tensor
    num_classes: int
    count: int | None = None

    def __post_init__(self):
        classes = as_integer("LabelPlan", "num_classes", self.num_classes, 1, MOST_CLASSES)
        pattern = as_labels("LabelPlan", "pattern", self.pattern, classes=classes)
        if len(pattern) == 0:
            fail("LabelPlan", "pattern", "hold at least one label", described(self.pattern))
        count = None if self.count is None else as_integer("LabelPlan", "count", self.count, 1)
        for name, value in (("pattern", pattern), ("num_classes", classes), ("count", count)):
            object.__setattr__(self, name, value)  # it is frozen

    @classmethod
    def balanced(cls, num_classes: int, count: int | None = None) -> "LabelPlan":
        """Round robin: id ``i`` has class ``i mod num_classes``."""
        classes = as_integer("LabelPlan", "num_classes", num_classes, 1, MOST_CLASSES)
        return cls(torch.arange(classes), classes, count)

    @classmethod
    def counts(cls, counts: Sequence[int] | Tensor, count: int | None = None) -> "LabelPlan":
        """``counts[c]`` images of class ``c`` in every ``sum(counts)`` ids (at most 10^8), spread evenly; ids below
        ``count`` exist. Raises: UserError naming the argument.
        """
        sizes = as_labels("LabelPlan", "counts", counts)
        if not 0 < float(sizes.double().sum()) <= LONGEST:
            fail(
                "LabelPlan", "counts", f"hold numbers >= 0 that do not sum to 0 or more than {LONGEST}", sizes.tolist()
            )
        sizes = sizes.cpu()
        labels = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        # The j-th of n_c images stands at (j + 1/2) / n_c; ties by class.
        start = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        position = (torch.arange(len(labels)) - start + 0.5).double() / sizes[labels]
        return cls(labels[torch.sort(position, stable=True).indices], len(sizes), count)

    @classmethod
    def explicit(cls, labels: Tensor) -> "LabelPlan":
        """Id ``i`` has class ``labels[i]``, integers ``[N]`` or ``[N, 1]``; other ids do not exist.

        Raises: UserError naming the argument.
        """
        checked = as_labels("LabelPlan", "labels", labels, classes=MOST_CLASSES)
        if len(checked) == 0:
            fail("LabelPlan", "labels", "hold at least one label", described(labels))
        return cls(checked, int(checked.max()) + 1, len(checked))

    def labels(self, ids: Tensor) -> Tensor:
        """Integer ids ``[B]`` -> int64 ``[B]`` classes."""
        ids = as_labels("LabelPlan", "ids", ids, classes=self.count)
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
