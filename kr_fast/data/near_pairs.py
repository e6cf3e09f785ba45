"""Pairs of images that differ by little, or by little and a shift of one pixel: all of them, though few are compared.

All pairs at 9 shifts take 35 TFLOP for 100,000 images of 28 px and 22 for 4,000 of 224 px in colour. Bounds that are a
product of short rows leave few of them:

1. Means of b x b pixels, times b, are no farther apart than the images are (large images only).
2. Nor are coordinates along orthonormal directions, with the norm of what these leave of an image as a last one:
   ``|x - y|^2 >= |P (x - y)|^2 + (|x - P x| - |y - P y|)^2``.
3. What is seen of an image at its 9 shifts lies in a ball, and another one is no farther from any of the 9 than from
   its centre less its radius: one product for all shifts, and each shift by itself for the pairs that it leaves.
4. Along one direction the images are sorted, so that a block of them meets a range of the others.
5. Where images differ in very many directions alike, the first few hold too little of a difference. Sums of all means
   under 64 rows S of random signs, over 8, hold it whole, whatever it is: ``|S (x - y)|^2 > 4 |x - y|^2`` has a
   probability of at most ``(4 e^-3)^32 = 4e-23`` (Achlioptas, "Database-friendly random projections", Journal of
   Computer and System Sciences 66 (2003)), as two digests of 128 bits may be equal by chance. Where means tell nothing,
   as of noise, sums of all pixels do.

Pairs below the bounds are decided by their pixels, in whole numbers. Images are read twice, some at a time, so that
memory holds them a block at a time, 89 to 153 numbers for each, and the pairs.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kr_fast.data.distances import (
    ROUNDING,
    SAMPLE,
    SIGNS,
    SLACK,
    crowds,
    product_dtype,
    random_signs,
    squared_differences,
)
from kr_fast.runtime import progress, seeds
from kr_fast.runtime.storage.image_rows import Images

DIRECTIONS, ROUNDS = 24, 6  # of the subspace iteration
WIDEST = 32  # means of a side, of which directions are taken
WIDEST_SIGNED = 256  # means of a side that get signs: 12 MiB of signs in colour
ROWS, COLUMNS = 1024, 2048  # of a block of bounds: 8 MiB
MOST_BYTES = 16 << 20  # of images at a time, and of their numbers
BAND_BYTES = 1 << 20  # of the numbers that meet their signs at a time
SIGNED_COST = 8  # pixels that are compared in the time of one bound by signs
SUMS_COST = 8  # pairs that are compared in the time of the sums of one image's pixels
LISTED_COST = 64  # pairs bounded by a product in the time in which one of a list is
SPARSE = 16  # of so many columns one is looked at to choose
PAIRS_AT_A_TIME = 1 << 18  # whose pixels are compared
MOST_PAIRS = 4_000_000  # that are kept; twice as many are held
SHIFTS = tuple(itertools.product((0, -1, 1), repeat=2))  # of the first of two images
Number = TypeVar("Number", float, Tensor)


@dataclasses.dataclass(frozen=True)
class NearPairs:
    """Pairs ``first < second`` of images, int64 ``[P]`` each, in ascending order.

    ``distance``: float64 ``[P]``, see :func:`near_pairs`; ``shifted``: bool ``[P]``, whether that is of a shift;
    ``complete``: False where there are more than :data:`MOST_PAIRS`, of which only some are held. ``crowds``: int64
    ``[N]``, see :func:`kr_fast.data.distances.crowds`: of the pairs within a crowd those with its first image are held.
    """

    first: Tensor
    second: Tensor
    distance: Tensor
    shifted: Tensor
    crowds: Tensor
    complete: bool = True

    def __len__(self) -> int:
        return len(self.first)


def near_pairs(images: Images, threshold: float) -> NearPairs:
    """All pairs of images whose distance is at most ``threshold``; mirrored and turned images are far apart.

    The distance is the root mean square difference in grey levels over the pixels that both have, at the best of 9
    shifts of at most one pixel either way.

    Args:
        images: uint8 ``[N, H, W, C]``, at least 3 px a side. Equal images are pairs too: pass one of each.
    """
    parts: list[tuple[Tensor, ...]] = []
    count, size, crowd = 0, _images_in(MOST_BYTES, images), crowds(images, threshold / 2)
    for number in range(int(crowd.max()) + 1 if len(crowd) else 0):
        members = (crowd == number).nonzero()[:, 0]
        first, others = members[:1], members[1:]
        for shift in SHIFTS:
            parts.append(_near(images[first], first, torch.zeros_like(others), images, others, shift, threshold))
    with progress.bar(2 * len(images), "near-duplicates", "image") as bar:  # each is read twice
        bounds = _Bounds(images, threshold, crowd, bar.update)
        for start in range(0, len(images), size):
            rows = bounds.order[start : start + size]
            met = bounds.meet(block := images[rows], start)
            for shift in SHIFTS:
                for i, j in _some_at_a_time(bounds.below(met, shift)):
                    parts.append(_near(block, rows, i, images, j, shift, threshold))
                    if (count := count + len(parts[-1][0])) > 2 * MOST_PAIRS:
                        parts = [_best(parts)]
                        if (count := len(parts[0][0])) > MOST_PAIRS:
                            return NearPairs(*parts[0], crowd, complete=False)
            bar.update(len(rows))
    return NearPairs(*_best(parts), crowd)


def _near(
    block: Tensor, rows: Tensor, i: Tensor, images: Images, j: Tensor, shift: tuple[int, int], threshold: float
) -> tuple[Tensor, ...]:
    """What :class:`NearPairs` holds of the pairs (i of ``block``, which are images ``rows``; image j) that are near."""
    height, width, channels = images.shape[1:]
    overlap = (height - abs(shift[0])) * (width - abs(shift[1])) * channels  # fewer pixels than the image has
    squares = squared_differences(block, i, images, j, shift)
    near = squares <= threshold**2 * overlap
    i, j, distance = rows[i[near]], j[near], (squares[near].double() / overlap).sqrt()
    moved = torch.full_like(i, shift != (0, 0), dtype=torch.bool)
    return torch.minimum(i, j), torch.maximum(i, j), distance, moved


class _Bounds:
    """Coordinates whose distances are bounds, by the rules above.

    Of an image all but its border is seen, and with a shift another part of that size, so that one basis serves all.
    ``order``: int64 ``[N]``, the images along the first direction.
    """

    def __init__(self, images: Images, threshold: float, crowd: Tensor, update: Callable[[int], None]):
        self.values = images.shape[1:].numel()
        self.most, size = threshold**2 * self.values, _images_in(MOST_BYTES, images)
        step = -(-len(images) // SAMPLE)
        some = torch.cat([_means(images[rows], (0, 0)) for rows in torch.arange(0, len(images), step).split(size)])
        self.mean = some.mean(0)
        some -= self.mean
        width = min(DIRECTIONS, some.shape[1])
        basis = torch.randn(some.shape[1], width, generator=seeds.generator(0, "directions"), dtype=torch.float64)
        for _ in range(ROUNDS):
            basis = torch.linalg.qr(some.T @ (some @ basis) + 1e-6 * basis).Q  # the last term: where images are equal
        # The first one is what images are sorted by.
        spread = (some @ basis).square().sum(0)
        self.basis = basis[:, spread.argsort(descending=True)]
        del some
        self.images, self.mean_signs = images, random_signs((len(self.mean),)).double()
        # Made first: pieces would lie between what each part frees, where nothing large fits any more.
        base = torch.empty(len(images), width + 1, dtype=product_dtype())
        sums = torch.empty(len(images), SIGNS, dtype=product_dtype())
        for start in range(0, len(images), size):
            now = slice(start, start + size)
            means = self._centred(images[now], (0, 0))
            base[now], sums[now] = self._coordinates(means), self._sums_of_means(means)
            update(len(means))
        self.order = base[:, 0].argsort()
        # Images outside of crowds are one each.
        self.crowd = torch.where(crowd < 0, -1 - torch.arange(len(crowd)), crowd)[self.order]
        self.along, self.base = base[self.order, 0], _Points(base[self.order])
        self.signed_means = _Points(sums[self.order])

    def meet(self, block: Tensor, start: int) -> "_Met":
        """What the bound for all shifts leaves of pairs of ``block``, images ``start`` and following of ``order``."""
        seen = {shift: self._coordinates(self._centred(block, shift)) for shift in SHIFTS}
        every = torch.stack(list(seen.values()))
        centre = every.mean(0)
        reach = self.most**0.5 + (every - centre).norm(dim=2).amax(0)
        limit, factors = self.base.against(centre, reach.square()[:, None])
        places = self._places(start, centre[:, 0], limit[:, 0].sqrt())
        # Is one bound for all shifts, and then pairs one by one, less work than a bound for each shift?
        share = float((factors @ self.base.factors[places][::SPARSE].T <= limit).double().mean())
        ranges = (self._places(start, each[:, 0], self.most**0.5) for each in seen.values())
        alone = sum(each.stop - each.start for each in ranges)
        many, few = [], [torch.empty(2, 0, dtype=torch.long)]
        if (places.stop - places.start) * (1 + len(SHIFTS) * LISTED_COST * share) > alone:
            return _Met(block, start, seen, few[0], [places])
        for columns in _slices(places):
            near = factors @ self.base.factors[columns].T <= limit
            if int(torch.count_nonzero(near)) * LISTED_COST > near.numel():
                many.append(columns)
                continue
            i, j = near.nonzero(as_tuple=True)
            later = (start + i < columns.start + j) & (self.crowd[start + i] != self.crowd[columns.start + j])
            few.append(torch.stack([i[later], columns.start + j[later]]))
        return _Met(block, start, seen, torch.cat(few, 1), many)

    def _places(self, start: int, along: Tensor, reach: float | Tensor) -> slice:
        """Of the images after ``start`` that lie within ``reach`` of some along the first direction."""
        low = int(torch.searchsorted(self.along, (along - reach).min()))
        high = int(torch.searchsorted(self.along, (along + reach).max(), right=True))
        return slice(max(start, low), max(start, high))

    def below(self, met: "_Met", shift: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of the block, shifted; images) that the bounds leave of its pairs."""
        limit, factors = self.base.against(met.seen[shift], self.most)
        means = functools.cache(lambda: self._centred(met.block, shift))
        # With each bound how many pairs must be left before its sums are worth their time.
        signed = [(0, functools.cache(lambda: self._signed(self.signed_means, self._sums_of_means(means()))))]
        if max(_block(met.block.shape, WIDEST)) > 1:
            pixels = functools.cache(lambda: self._signed(self.signed_pixels, self._sums(met.block, shift)))
            signed.append((SUMS_COST * len(met.block), pixels))
        left = 0
        for i, j in zip(*(each.split(PAIRS_AT_A_TIME) for each in met.few), strict=True):
            near = _products(factors, i, self.base.factors, j) <= limit
            i, j = i[near], j[near]
            for price, bound in signed:
                if len(i) * self.values <= SIGNED_COST * len(self.mean) * len(met.block) or left + len(i) <= price:
                    break
                base, most, sums = bound()
                near = _products(sums, i, base, j) <= most
                i, j = i[near], j[near]
            left += len(i)
            yield i, self.order[j]
        places = self._places(met.start, met.seen[shift][:, 0], limit**0.5)
        for columns in (part for many in met.many for part in _slices(_both(many, places))):
            squares = factors @ self.base.factors[columns].T
            rows = (squares.amin(1) <= limit).nonzero()[:, 0]
            if not len(rows):
                continue
            near = squares[rows] <= limit
            near &= (met.start + rows)[:, None] < torch.arange(columns.start, columns.stop)
            near &= self.crowd[met.start + rows][:, None] != self.crowd[columns]
            for price, bound in signed:
                count = int(torch.count_nonzero(near))
                if count * self.values <= SIGNED_COST * near.numel() or left + count <= price:
                    break
                base, most, sums = bound()
                near &= sums[rows] @ base[columns].T <= most
            i, j = near.nonzero(as_tuple=True)
            left += len(i)
            yield rows[i], self.order[columns.start + j]

    @functools.cached_property
    def signed_pixels(self) -> "_Points":
        """Of all images, which are read once more where their means do not tell them apart."""
        sums, size = torch.empty(len(self.order), SIGNS, dtype=product_dtype()), _images_in(MOST_BYTES, self.images)
        for start in range(0, len(sums), size):
            sums[start : start + size] = self._sums(self.images[self.order[start : start + size]], (0, 0))
        return _Points(sums)

    @functools.cached_property
    def signs(self) -> Tensor:
        """int8 ``[h, w, C, SIGNS]``, of pixels, or of means of very large images."""
        height, width, channels = self.images.shape[1:]
        tall, wide = _block(self.images.shape, WIDEST_SIGNED)
        return random_signs(((height - 2) // tall, (width - 2) // wide, channels))

    def _signed(self, points: "_Points", sums: Tensor) -> tuple[Tensor, float, Tensor]:
        """(factors of all images, the limit of their product with these, factors of some images)."""
        return points.factors, *points.against(sums, SLACK * self.most)

    def _centred(self, images: Tensor, shift: tuple[int, int]) -> Tensor:
        return _means(images, shift).sub_(self.mean)

    def _coordinates(self, means: Tensor) -> Tensor:
        """``[n, K + 1]``."""
        inside = means @ self.basis
        rest = (means.square().sum(1) - inside.square().sum(1)).clamp_min_(0).sqrt()
        return torch.cat([inside, rest[:, None]], 1).to(product_dtype())

    def _sums_of_means(self, means: Tensor) -> Tensor:
        """``[n, SIGNS]``: sums of means under random signs, over the root of SIGNS."""
        return (means @ self.mean_signs).div_(SIGNS**0.5).to(product_dtype())

    def _sums(self, images: Tensor, shift: tuple[int, int]) -> Tensor:
        """``[n, SIGNS]``: the same of pixels less 128."""
        kind, middle = product_dtype(), 128 * math.prod(_block(images.shape, WIDEST_SIGNED)) ** 0.5
        sums = torch.zeros(len(images), SIGNS, dtype=kind)
        for band, pixels in _bands(images, WIDEST_SIGNED, shift):
            sums += pixels.sub_(middle).flatten(1).to(kind) @ self.signs[band].flatten(0, 2).to(kind)
        return sums.div_(SIGNS**0.5)


@dataclasses.dataclass(frozen=True)
class _Met:
    """Images in a row of ``order`` and the pairs of each with those after it: by place, or blocks of places.

    ``seen``: coordinates by shift; ``few``: int64 ``[2, P]``, (row of the block, place); ``many``: places.
    """

    block: Tensor
    start: int
    seen: dict[tuple[int, int], Tensor]
    few: Tensor
    many: list[slice]


class _Points:
    """Points ``[N, K]`` whose squared distances to others are one product: |q|^2 + |p|^2 - 2 q p."""

    def __init__(self, points: Tensor):
        self.middle = points.mean(0)  # from where they are rounded least
        points = points - self.middle
        squares = points.square().sum(1, keepdim=True)
        self.largest = float(squares.max())
        self.factors = torch.cat([-2 * points, torch.ones_like(squares), squares], 1)

    def against(self, points: Tensor, most: Number) -> tuple[Number, Tensor]:
        """(``most``, a number or ``[n, 1]``, and what rounding adds, factors ``[n, K + 2]``) of other points."""
        points = points - self.middle
        squares = points.square().sum(1, keepdim=True)
        limit = most * (1 + ROUNDING) + ROUNDING * (float(squares.max()) + self.largest)
        return limit, torch.cat([points, squares, torch.ones_like(squares)], 1)


def _products(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """``[P]``: of rows i of ``x`` and j of ``y``."""
    parts = zip(i.split(ROWS), j.split(ROWS), strict=True)
    return torch.cat([(x[some] * y[others]).sum(1) for some, others in parts])


def _images_in(size: int, images: Images) -> int:
    """Images of so many bytes: at least one, at most a block's."""
    return max(1, min(ROWS, size // images.shape[1:].numel()))


def _block(shape: Sequence[int], widest: int) -> tuple[int, int]:
    """(height, width) of the blocks of images without their border of which there are at most ``widest`` a side."""
    sides = [side - 2 for side in shape[1:3]]
    most = -(-max(sides) // widest)
    return min(most, sides[0]), min(most, sides[1])


def _bands(images: Tensor, widest: int, shift: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """(rows of means, the means) from top to bottom: float32 ``[n, h, w, C]``, times the root of the pixels of a block.

    They are so few at a time that they stay in a cache.
    """
    tall, wide = _block(images.shape, widest)
    top, left = 1 + shift[0], 1 + shift[1]
    down, across = (images.shape[1] - 2) // tall, (images.shape[2] - 2) // wide
    step = max(1, BAND_BYTES // (4 * images[:, 0].numel() * tall))
    for first in range(0, down, step):
        last = min(first + step, down)
        seen = images[:, top + first * tall : top + last * tall, left : left + across * wide].float()
        if tall * wide > 1:
            seen = seen.unflatten(1, (last - first, tall)).sum(2)
            seen = seen.unflatten(2, (across, wide)).sum(3).div_((tall * wide) ** 0.5)
        yield slice(first, last), seen


def _means(images: Tensor, shift: tuple[int, int]) -> Tensor:
    """float64 ``[n, D]``: at most :data:`WIDEST` means a side, of the images without their border."""
    return torch.cat([means for _, means in _bands(images, WIDEST, shift)], 1).flatten(1).double()


def _both(first: slice, second: slice) -> slice:
    return slice(max(first.start, second.start), min(first.stop, second.stop))


def _slices(whole: slice) -> Iterator[slice]:
    """Blocks of columns."""
    return (slice(at, min(at + COLUMNS, whole.stop)) for at in range(whole.start, whole.stop, COLUMNS))


def _some_at_a_time(pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of several blocks of bounds, so that their pixels are compared together."""
    held: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        held.append(pair)
        if sum(len(i) for i, _ in held) > PAIRS_AT_A_TIME:
            yield tuple(map(torch.cat, zip(*held, strict=True)))
            held = []
    if held:
        yield tuple(map(torch.cat, zip(*held, strict=True)))


def _best(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Each pair once, at its best shift; none before one."""
    none = (torch.empty(0, dtype=kind) for kind in (torch.long, torch.long, torch.float64, torch.bool))
    first, second, distance, shifted = (torch.cat(each) for each in zip(tuple(none), *parts, strict=True))
    # One sort of whole numbers: four keys one after the other take ten times as long.
    keys, order = (first << 32 | second).sort()
    new = torch.ones(len(keys), dtype=torch.bool)
    new[1:] = keys[1:] != keys[:-1]
    pair, kept = new.cumsum(0) - 1, order[new]
    distance, shifted = distance[order], shifted[order]
    least = torch.full((len(kept),), torch.inf, dtype=torch.float64).scatter_reduce_(0, pair, distance, "amin")
    moved = torch.ones(len(kept), dtype=torch.bool)
    moved[pair[(distance == least[pair]) & ~shifted]] = False
    return first[kept], second[kept], least, moved
