"""Queries of an attack as index arithmetic: which source pixel stands at each pixel of the image that a model sees."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer

BORDERS = ("replicate", "reflect")


@dataclasses.dataclass(frozen=True)
class Query:
    """One view of every image: mirrored left-right first if ``flip``, then moved, then cut.

    Pixel ``(y, x)`` of the view is pixel ``(y + top - down, x + left - right)`` of the (mirrored) image, where
    ``top = (H - h) // 2`` and ``left = (W - w) // 2`` centre a view of ``size = (h, w)`` (None: the whole image).

    Args:
        down, right: pixels; negative for up and left.
        border: what lies beyond the edge, "replicate" (the edge pixel) or "reflect" (mirrored without repeating it).
    """

    flip: bool = False
    down: int = 0
    right: int = 0
    border: str = "replicate"
    size: tuple[int, int] | None = None

    def __post_init__(self):
        if self.border not in BORDERS:
            fail("Query", "border", f"be one of {', '.join(BORDERS)}", self.border)
        for name in ("down", "right"):
            object.__setattr__(self, name, as_integer("Query", name, getattr(self, name)))  # it is frozen
        if self.size is not None:
            if not isinstance(self.size, Sequence) or isinstance(self.size, str) or len(self.size) != 2:
                fail("Query", "size", "be (height, width) or None", repr(self.size))
            object.__setattr__(self, "size", tuple(as_integer("Query", "size", each, 1) for each in self.size))

    def view_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the view of ``height`` x ``width`` pixels. Raises: UserError where it is larger."""
        size = (height, width) if self.size is None else tuple(self.size)
        if not (0 < size[0] <= height and 0 < size[1] <= width):
            fail("Query", "size", f"lie within the images' {height} x {width}", size)
        return size

    def index(self, height: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Source rows ``[h]`` and columns ``[w]`` of the view, or None where the view is the image."""
        h, w = self.view_size(height, width)
        if not (self.flip or self.down or self.right) and (h, w) == (height, width):
            return None
        rows = _fold(torch.arange(h) + (height - h) // 2 - self.down, height, self.border)
        columns = _fold(torch.arange(w) + (width - w) // 2 - self.right, width, self.border)
        return rows, width - 1 - columns if self.flip else columns


def _fold(index: Tensor, size: int, border: str) -> Tensor:
    if border == "reflect" and size > 1:
        period = 2 * (size - 1)
        index = index.remainder(period)
        return torch.minimum(index, period - index)
    return index.clamp(0, size - 1)


_LIRA = tuple(Query(flip, 1 - dx, 1 - dy, "reflect") for flip in (False, True) for dx in range(3) for dy in range(3))
AUGMENTS: dict[str, tuple[Query, ...]] = {
    "none": (Query(),),
    "flip": (Query(), Query(flip=True)),
    "shift": (Query(), Query(down=1), Query(down=-1), Query(right=1), Query(right=-1)),
    "lira": _LIRA,
}


def as_queries(augment: str | Sequence[Query], height: int, width: int) -> tuple[Query, ...]:
    """The queries of a name, or the given ones, all of one view size."""
    if isinstance(augment, str):
        if augment not in AUGMENTS:
            fail("ModelArray", "augment", f"be one of {', '.join(AUGMENTS)}", augment)
        return AUGMENTS[augment]
    queries = tuple(augment) if isinstance(augment, Iterable) else ()
    if not queries or not all(isinstance(query, Query) for query in queries):
        fail("ModelArray", "augment", f"be one of {', '.join(AUGMENTS)}, or a sequence of Query", repr(augment))
    sizes = {query.view_size(height, width) for query in queries}
    if len(sizes) > 1:
        fail("ModelArray", "augment", "hold queries of one size", sorted(sizes))
    return queries
