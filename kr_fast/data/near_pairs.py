"""Pairs of images that differ by little, or by little and a shift of one pixel: all of them, though few are compared.

All pairs of 100,000 images of 28 px at 9 shifts are 35 TFLOP. Three bounds leave few of them, and lose none:

1. Means of b x b pixels, times b, are no farther apart than the images are (large images only).
2. Nor are coordinates along orthonormal directions, with the norm of what these leave of an image as a last one:
   ``|x - y|^2 >= |P (x - y)|^2 + (|x - P x| - |y - P y|)^2``.
3. Along one direction the images are sorted, so that a block of them meets a range of the others.

What remains is one matrix product of short rows. Pairs below the bound are decided by their pixels, in whole numbers.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kr_fast.data.distances import SAMPLE, product_dtype
from kr_fast.runtime import seeds

DIRECTIONS, ROUNDS = 24, 6  # of the subspace iteration
WIDEST = 32  # means of a side, of which directions are taken
ROWS, COLUMNS = 1024, 2048  # of a block of bounds: 8 MiB
MOST_BYTES = 16 << 20  # of images in float64 at a time
MOST_PAIRS = 20_000_000  # that are kept; a set with more of them is no set of pictures
# One of each pair of opposite shifts: that of x against y is the opposite one of y against x.
SHIFTS = ((0, 0), (0, 1), (1, -1), (1, 0), (1, 1))
ROUNDING = 1e-5  # of squared norms in float32


@dataclasses.dataclass(frozen=True)
class NearPairs:
    """Pairs ``first < second`` of images, int64 ``[P]`` each, in ascending order.

    ``distance``: float64 ``[P]``, see :func:`near_pairs`; ``shifted``: bool ``[P]``, whether that is of a shift;
    ``complete``: False where there are more than :data:`MOST_PAIRS`, of which only so many are held.
    """

    first: Tensor
    second: Tensor
    distance: Tensor
    shifted: Tensor
    complete: bool = True

    def __len__(self) -> int:
        return len(self.first)


class Joined:
    """Images of several tensors as one; nothing is copied until it is asked for.

    Args:
        parts: uint8 ``[N_k, H, W, C]``; rows: int64 ``[N]``, numbers over all parts, in the order of these; None: all.
    """

    def __init__(self, parts: Sequence[Tensor], rows: Tensor | None = None):
        self.parts, self.starts = parts, torch.tensor([0, *map(len, parts)]).cumsum(0)
        self.rows = torch.arange(int(self.starts[-1])) if rows is None else rows
        self.shape = torch.Size((len(self.rows), *parts[0].shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        rows = self.rows[index]
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for part, start, end in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            mine = (rows >= start) & (rows < end)
            images[mine] = part[rows[mine] - start]
        return images


def near_pairs(images: Tensor | Joined, threshold: float) -> NearPairs:
    """All pairs of images whose distance is at most ``threshold``; mirrored and turned images are far apart.

    The distance is the root mean square difference in grey levels over the pixels that both have, at the best of 9
    shifts of at most one pixel either way.

    Args:
        images: uint8 ``[N, H, W, C]``, at least 3 px a side. Equal images are pairs too: pass one of each.
    """
    height, width, channels = images.shape[1:]
    bounds, most = _Bounds(images).of_all(), threshold**2 * height * width * channels
    order = bounds[0][:, 0].argsort()
    base, parts, count = bounds[0][order], [], 0
    for shift, queries in zip(SHIFTS, bounds, strict=True):
        # Of the overlap there are fewer pixels than of the image.
        size = (height - abs(shift[0])) * (width - abs(shift[1])) * channels
        for i, j in _below(queries, base, most):
            j = order[j]
            chosen = i < j if shift == (0, 0) else i != j
            i, j = i[chosen], j[chosen]
            squares = _squares(images, i, j, shift)
            near = squares <= threshold**2 * size
            i, j, distance = i[near], j[near], (squares[near].double() / size).sqrt()
            parts.append((torch.minimum(i, j), torch.maximum(i, j), distance, torch.full_like(i, shift != (0, 0))))
            if (count := count + len(i)) > MOST_PAIRS:
                return _best(parts, complete=False)
    return _best(parts)


class _Bounds:
    """Coordinates whose distances are bounds, by the first two rules above.

    Of an image all but its border is seen, and with a shift another part of that size, so that one basis serves all.
    """

    def __init__(self, images: Tensor | Joined):
        self.images = images
        self.factor = -(-(max(images.shape[1:3]) - 2) // WIDEST)
        some = torch.cat([self._means(part, (0, 0)) for part in self._parts(-(-len(images) // SAMPLE))])
        self.mean = some.mean(0)
        some -= self.mean
        width = min(DIRECTIONS, some.shape[1])
        basis = torch.randn(some.shape[1], width, generator=seeds.generator(0, "directions"), dtype=torch.float64)
        for _ in range(ROUNDS):
            basis = torch.linalg.qr(some.T @ (some @ basis) + 1e-6 * basis).Q  # the last term: where images are equal
        # The first one is what images are sorted by.
        spread = (some @ basis).square().sum(0)
        self.basis = basis[:, spread.argsort(descending=True)]

    def of_all(self) -> list[Tensor]:
        """``[N, K + 1]`` for each of :data:`SHIFTS`; every image is read once."""
        rows: list[list[Tensor]] = [[] for _ in SHIFTS]
        kind = product_dtype()
        for part in self._parts():
            for shift, each in zip(SHIFTS, rows, strict=True):
                means = self._means(part, shift).sub_(self.mean)
                inside = means @ self.basis
                rest = (means.square().sum(1) - inside.square().sum(1)).clamp_min_(0).sqrt()
                each.append(torch.cat([inside, rest[:, None]], 1).to(kind))
        return list(map(torch.cat, rows))

    def _parts(self, step: int = 1) -> Iterator[Tensor]:
        """Images, some at a time."""
        size = max(1, MOST_BYTES // (8 * self.images.shape[1:].numel()))
        return (self.images[rows] for rows in torch.arange(0, len(self.images), step).split(size))

    def _means(self, images: Tensor, shift: tuple[int, int]) -> Tensor:
        """float64 ``[n, D]``: means of the images without their border, times ``factor``."""
        _, height, width, _ = images.shape
        dy, dx = shift
        seen = images[:, 1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx].permute(0, 3, 1, 2)
        if self.factor == 1:
            return seen.double().flatten(1)
        sides = [min(self.factor, side) for side in seen.shape[2:]]
        return avg_pool2d(seen.float(), sides).double().flatten(1) * (sides[0] * sides[1]) ** 0.5


def _below(queries: Tensor, base: Tensor, most: float) -> Iterator[tuple[Tensor, Tensor]]:
    """(queries, rows of ``base``) whose squared distance is at most ``most``; ``base`` ascends in the first column."""
    squares, of_base = queries.square().sum(1), base.square().sum(1)
    limit = most * (1 + ROUNDING) + ROUNDING * (float(squares.max()) + float(of_base.max()))
    # One product then gives |q|^2 + |b|^2 - 2 q b.
    queries = torch.cat([queries, squares[:, None], torch.ones_like(squares)[:, None]], 1)
    factors = torch.cat([-2 * base, torch.ones_like(of_base)[:, None], of_base[:, None]], 1)
    order, along, reach = queries[:, 0].argsort(), base[:, 0].contiguous(), limit**0.5
    for rows in order.split(ROWS):
        some = queries[rows]
        low = int(torch.searchsorted(along, some[0, 0] - reach))
        high = int(torch.searchsorted(along, some[-1, 0] + reach, right=True))
        for start in range(low, high, COLUMNS):
            block = some @ factors[start : min(start + COLUMNS, high)].T
            near = (block.amin(1) <= limit).nonzero()[:, 0]
            if len(near):
                i, j = (block[near] <= limit).nonzero(as_tuple=True)
                yield rows[near[i]], start + j


def _squares(images: Tensor | Joined, i: Tensor, j: Tensor, shift: tuple[int, int]) -> Tensor:
    """int64: squared differences, summed, of the pixels of images i, shifted, that are in images j too."""
    _, height, width, channels = images.shape
    frames = []
    for dy, dx in (shift, (-shift[0], -shift[1])):
        frames.append((slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))))
    size, sums = max(1, MOST_BYTES // (4 * height * width * channels)), []
    for a, b in zip(i.split(size), j.split(size), strict=True):
        x, y = (images[rows][(slice(None), *frame)].int() for rows, frame in ((a, frames[0]), (b, frames[1])))
        sums.append((x - y).square_().flatten(1).sum(1))
    return torch.cat(sums) if sums else i


def _best(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], complete: bool = True) -> NearPairs:
    """Each pair once, at its best shift; none before one."""
    whole, real = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.float64)
    parts = [(whole, whole, real, whole), *parts]
    first, second, distance, shifted = (torch.cat(each) for each in zip(*parts, strict=True))
    order = torch.from_numpy(np.lexsort((shifted, distance, second, first)))  # by the last one first
    first, second, distance, shifted = first[order], second[order], distance[order], shifted[order]
    new = torch.ones(len(first), dtype=torch.bool)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return NearPairs(first[new], second[new], distance[new], shifted[new].bool(), complete)
