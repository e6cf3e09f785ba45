"""Euclidean distances between many images, a block at a time; exact where pixels are whole numbers."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kr_fast.runtime import seeds
from kr_fast.runtime.storage.image_rows import ImageRows, Images, batches, rows_of

MOST_BYTES = 32 << 20  # of a block of distances
TILE_BYTES = 32 << 20  # of the rows that a product takes at a time
MOST_FLOATS = 32 << 20  # values of short rows that are kept as floats
PIECE = 1024  # values of a product: 1,024 x 128 x 128 = 2^24, up to which float32 holds every whole number
MOST_VALUES = 64 << 20  # of images among which neighbours are looked for, which takes 275 GFLOP
SAMPLE = 2048  # images by which a spacing is estimated, and a direction chosen
CENTRES, LEAST = 512, 64  # images among which crowds are looked for, and the part of them that is one
PRODUCT_COST = 16  # products of two images in the time in which one pair is compared
PIXELS = 1 << 20  # that are compared at a time, so that they stay in a cache
ROUNDS = 8  # of the power iteration
SHARE = 0.25  # of the spacing of a set, up to which two images are near-duplicates
SIGNS, SLACK = 64, 4.0  # sums under random signs, see within
SIGNED = 1 << 16  # values of a row that meet their signs at a time
ROUNDING = 1e-5  # of squared norms of what was summed in float32


class Rows:
    """Images as rows, with their squared norms; the distances of whole numbers are exact.

    Pixels less 128 are whole numbers of at most 7 bits and a sign, so the product of two rows of 1,024 of them is exact
    in float32, and so is a squared distance of up to 2^24. Longer rows, and very many, stay bytes where they are; tiles
    of them are multiplied in pieces of that length, added up in float64, which is exact throughout. What is no uint8
    (features) is taken in float64.

    Args:
        values: ``[N, ...]``.
    """

    def __init__(self, values: Images):
        self.values: Images
        if values.dtype != torch.uint8:
            self.values = values.flatten(1).double()
        elif values.shape[1:].numel() <= PIECE and values.numel() <= MOST_FLOATS:
            self.values = _centred(values[:].flatten(1))
        else:
            self.values = ImageRows(values)
        self.squares = _of_tiles(self, lambda x: x.square().sum(1))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Tensor | slice) -> "Rows":
        part = object.__new__(Rows)
        part.values, part.squares = rows_of(self.values, index), self.squares[index]
        return part

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.values.shape[1:].numel()

    def tiles(self, size: int = 1) -> Iterator[Tensor]:
        """``[n, D]`` one after the other, as many as fit into :data:`TILE_BYTES` with ``size`` bytes for each value."""
        step = max(1, min(SAMPLE, TILE_BYTES // (size * self.width)))
        return (self.values[first : first + step].flatten(1) for first in range(0, max(len(self), 1), step))

    def squared_distances(self, others: "Rows") -> Tensor:
        """``[n, m]``: ``|x|^2 + |y|^2 - 2 x y``, at least 0; 0 exactly for equal images."""
        if isinstance(self.values, Tensor) and isinstance(others.values, Tensor):
            block = self.values @ others.values.T
        else:
            block, row = torch.zeros(len(self), len(others), dtype=torch.float64), 0
            for x in self.tiles():
                column = 0
                for y in others.tiles():
                    tile = block[row : row + len(x), column : column + len(y)]
                    for pieces in zip(x.split(PIECE, 1), y.split(PIECE, 1), strict=True):
                        first, second = map(_centred, pieces)
                        tile += first @ second.T
                    column += len(y)
                row += len(x)
        kind = block.dtype
        return block.mul_(-2).add_(others.squares.to(kind)).add_(self.squares.to(kind)[:, None]).clamp_min_(0)

    def blocks(self, columns: int, most: int = MOST_BYTES) -> Iterator[tuple[int, "Rows"]]:
        """(first row, rows) of blocks whose distances to ``columns`` others fit into ``most`` bytes."""
        size = max(1, most // (8 * columns))
        for first in range(0, len(self), size):
            yield first, self[first : first + size]


def nearest(rows: Rows, others: Images) -> Tensor:
    """float64 ``[N]``: Euclidean distance of each row to the nearest of ``others`` ``[M, ...]``, M > 0."""
    return _least_squares(rows, Rows(others)).sqrt()


def spacing(images: Images) -> float:
    """Median distance of an image to the nearest other one: root mean square difference of values, in grey levels.

    Of more than 2,048 images as many are asked, spread evenly along the direction in which the images differ most. Of
    more than 64 Mi values every second image is taken, or every third, and so on.

    Args:
        images: ``[N, ...]`` with N > 1.
    """
    rows = Rows(rows_of(images, slice(None, None, max(1, -(-images.numel() // MOST_VALUES)))))
    asked = torch.arange(len(rows))
    if len(rows) > SAMPLE:
        asked = _along(rows, _direction(rows)).argsort()[:: -(-len(rows) // SAMPLE)]
    return float((_least_squares(rows[asked], rows, asked) / rows.width).sqrt().median())


def within(images: Images, others: Images, threshold: float) -> tuple[Tensor, Tensor]:
    """Which of ``images`` lie within ``threshold`` of one of ``others``, and which of ``others`` within it of these.

    The distance is the root mean square difference of values. Pairs are decided exactly, and few are computed: along
    one direction two images are no farther apart than in all of them, so each block of images, sorted along the
    direction in which they differ most, meets only those others that are near enough there. Of these, long rows are
    compared only where their sums under 64 rows S of random signs, over 8, are near enough too: ``|S (x - y)|^2 > 4 |x
    - y|^2`` has a probability of at most ``(4 e^-3)^32 = 4e-23`` (Achlioptas, "Database-friendly random projections",
    Journal of Computer and System Sciences 66 (2003)), as two digests of 128 bits may be equal by chance.

    Args:
        images: uint8 ``[N, H, W, C]``; others: ``[M, H, W, C]``.
    Returns: bool ``[N]``, bool ``[M]``.
    """
    x, y = Rows(images), Rows(others)
    near_x, near_y = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool)
    if len(x) == 0 or len(y) == 0:
        return near_x, near_y
    direction, most = _direction(x), threshold**2 * x.width
    long = not isinstance(x.values, Tensor)
    (along_x, order_x), (along_y, order_y) = (_along(each, direction).sort() for each in (x, y))
    x, y = x[order_x], y[order_y]
    reach = most**0.5 + 1e-3  # the projections are rounded in the last digits of float64
    sums = (_sums(x), _sums(y)) if long else None
    for first, part in x.blocks(SAMPLE):
        ends = along_x[[first, first + len(part) - 1]] + torch.tensor([-reach, reach])
        low, high = int(torch.searchsorted(along_y, ends[0])), int(torch.searchsorted(along_y, ends[1], right=True))
        for start in range(low, high, SAMPLE):
            stop = min(start + SAMPLE, high)
            hits = _near(x, slice(first, first + len(part)), y, slice(start, stop), most, sums)
            near_x[order_x[first : first + len(part)]] |= hits.any(1)
            near_y[order_y[start:stop]] |= hits.any(0)
    return near_x, near_y


def _near(x: Rows, i: slice, y: Rows, j: slice, most: float, sums: tuple[Tensor, Tensor] | None) -> Tensor:
    """bool ``[n, m]``: which of rows ``i`` of ``x`` lie within squared distance ``most`` of which of rows ``j``."""
    if sums is not None:
        first, second = sums[0][i], sums[1][j]
        squares = first.square().sum(1, keepdim=True), second.square().sum(1)
        limit = SLACK * most + ROUNDING * (float(squares[0].max()) + float(squares[1].max()))
        near = squares[0] + squares[1] - 2 * first @ second.T <= limit
        rows, columns = near.nonzero(as_tuple=True)
        if PRODUCT_COST * len(rows) < near.numel():
            asked, at = rows.unique(return_inverse=True)
            for start, some in _parts(asked, max(1, TILE_BYTES // x.width)):
                own = ((at >= start) & (at < start + len(some))).nonzero()[:, 0]
                pair = (x.values[i.start + some], at[own] - start, y.values, j.start + columns[own])
                near[rows[own], columns[own]] = squared_differences(*pair, (0, 0)) <= most
            return near
    return x[i].squared_distances(y[j]) <= most


def _sums(rows: Rows) -> Tensor:
    """float64 ``[N, SIGNS]``: sums of each row's values less 128 under random signs, over the root of SIGNS."""
    sums, first, signs = torch.empty(len(rows), SIGNS, dtype=torch.float64), 0, random_signs((rows.width,))
    for part in rows.tiles(4):
        own = torch.zeros(len(part), SIGNS, dtype=torch.float64)
        for pixels, some in zip(part.split(SIGNED, 1), signs.split(SIGNED), strict=True):
            own += _centred(pixels) @ some.to(product_dtype())
        sums[first : first + len(part)] = own.div_(SIGNS**0.5)
        first += len(part)
    return sums


def random_signs(shape: tuple[int, ...]) -> Tensor:
    """int8 ``[*shape, SIGNS]``: 1 and -1 by chance, the same in each call."""
    generator = seeds.generator(0, "signs")
    return torch.randint(0, 2, (*shape, SIGNS), generator=generator, dtype=torch.int8).mul_(2).sub_(1)


def crowds(images: Images, radius: float) -> Tensor:
    """Which images of a large set crowd together, as nearly blank ones do: int64 ``[N]``, the crowd or -1.

    A crowd lies within ``radius`` of one image, so no two of it are farther apart than twice that, and they need not be
    compared. It holds a 64th of the images or more, by 512 of them; smaller ones are left alone, and so are sets of at
    most 2,048 images, whose pairs are few.
    """
    crowd = torch.full((len(images),), -1)
    if len(images) <= SAMPLE or radius <= 0:
        return crowd
    some = rows_of(images, torch.arange(0, len(images), -(-len(images) // CENTRES)))
    rows, centres = Rows(some), []
    most = radius**2 * rows.width
    near = rows.squared_distances(rows) <= most
    while int((counts := near.sum(1)).max()) * LEAST >= len(rows):
        centres.append(int(counts.argmax()))
        near[:, near[centres[-1]].clone()] = False
    if centres:
        centre, start = rows[torch.tensor(centres)], 0
        for part in batches(images):
            squares = centre.squared_distances(Rows(part)).min(0)
            crowd[start : start + len(part)] = torch.where(squares.values <= most, squares.indices, -1)
            start += len(part)
    return crowd


def squared_differences(block: Tensor, i: Tensor, images: Images, j: Tensor, shift: tuple[int, int]) -> Tensor:
    """int64: squared differences, summed, of the pixels of images i of ``block``, shifted, that are in images j too.

    Where most of some images meet most of others, as many that are nearly blank do, by products of all.
    """
    (_, height, width, _), values = block.shape, block.shape[1:].numel()
    frames = []
    for dy, dx in (shift, (-shift[0], -shift[1])):
        frames.append((slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))))

    def framed(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
        pairs = ((block, rows), (images, columns))
        return (of[index][(slice(None), *frame)] for frame, (of, index) in zip(frames, pairs, strict=True))

    sums, (columns, place) = torch.empty_like(i), j.unique(return_inverse=True)
    for first, some in _parts(columns, max(1, min(SAMPLE, TILE_BYTES // (2 * values)))):
        own = ((place >= first) & (place < first + len(some))).nonzero()[:, 0]
        rows, at = i[own].unique(return_inverse=True)
        if PRODUCT_COST * len(own) >= len(rows) * len(some):
            x, y = (Rows(each.contiguous()) for each in framed(rows, some))
            sums[own] = x.squared_distances(y)[at, place[own] - first].long()
            continue
        for pairs in own.split(max(1, PIXELS // values)):
            x, y = (each.int() for each in framed(i[pairs], j[pairs]))
            sums[pairs] = x.sub_(y).square_().flatten(1).sum(1)
    return sums


def _parts(values: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """(where it starts, a part of ``size``)."""
    return ((first, values[first : first + size]) for first in range(0, len(values), size))


def _least_squares(rows: Rows, others: Rows, besides: Tensor | None = None) -> Tensor:
    """float64 ``[N]``: squared distance of each row to the nearest of ``others``, but for one of ``besides`` each."""
    least = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    for start in range(0, len(others), SAMPLE):  # so that bytes become floats once for many rows
        some = others[start : start + SAMPLE]
        for first, part in rows.blocks(len(some)):
            block, now = part.squared_distances(some), slice(first, first + len(part))
            if besides is not None:
                own = besides[now] - start
                inside = ((own >= 0) & (own < len(some))).nonzero()[:, 0]
                block[inside, own[inside]] = torch.inf
            least[now] = torch.minimum(least[now], block.min(1).values)
    return least


def _centred(pixels: Tensor) -> Tensor:
    """Bytes less 128; what that was done to as it is."""
    return pixels.to(product_dtype()).sub_(128) if pixels.dtype == torch.uint8 else pixels


def product_dtype() -> torch.dtype:
    """float32 unless a setting of torch rounds the factors of its products, else float64."""
    return torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64


def _numbers(values: Tensor) -> Tensor:
    """In float64, as they are multiplied."""
    return values.double().sub_(128) if values.dtype == torch.uint8 else values.double()


def _direction(rows: Rows) -> Tensor:
    """A unit vector, float64 ``[D]``, near the first principal component of some rows, spread evenly."""
    some = rows[:: -(-len(rows) // SAMPLE)]

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        return sum(of(_numbers(part)) for part in some.tiles(8)) / len(some)

    centre = mean(lambda x: x.sum(0))
    vector = mean(lambda x: (x - centre).abs_().sum(0)) + 1e-9
    for _ in range(ROUNDS):
        vector = vector / vector.norm()
        turned = mean(lambda x, along=vector: (y := x - centre).T @ (y @ along))
        vector = turned if float(turned.norm()) > 0 else vector
    return vector / vector.norm()


def _along(rows: Rows, direction: Tensor) -> Tensor:
    """float64 ``[N]``: where each row lies along a direction."""
    return _of_tiles(rows, lambda x: x @ direction)


def _of_tiles(rows: Rows, of: Callable[[Tensor], Tensor]) -> Tensor:
    """float64 ``[N]``: a value of each row.

    It is made first: pieces that were made between tiles would lie among what these free, so that no later one fits
    there, and a process that keeps what it frees would come to hold the whole set.
    """
    values, first = torch.empty(len(rows), dtype=torch.float64), 0
    for part in rows.tiles(8):
        values[first : first + len(part)] = of(_numbers(part))
        first += len(part)
    return values
