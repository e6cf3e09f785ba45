"""Images that are equal, or nearly: a record on both sides of a split biases every comparison of the two sides."""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kr_fast.data.distances import SHARE, spacing
from kr_fast.data.near_pairs import NearPairs, near_pairs
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_images
from kr_fast.runtime.storage.image_rows import ImageRows, Images, batches

COLUMNS = ("split", "index", "of_split", "of_index", "distance", "shifted", "dropped")
PAIR = ("first", "second", "distance", "shifted")
MOST_KEPT = 4
LISTED = 1 << 16  # pairs that are objects of Python at a time
_KEPT: dict[bytes, "SplitDuplicates"] = {}  # by digest of the images: several runs on one set search it once


def shared_images(images: Tensor | Any, others: Tensor | Any) -> Tensor:
    """Which of ``images`` are byte-equal to one of ``others``, as a bool mask ``[N]``.

    ``int(mask.sum())`` is their number and ``mask.nonzero()[:, 0]`` their indices. Images are compared by 128-bit
    BLAKE2b digests, about two seconds for a million images of 28 px.

    Args:
        images, others: uint8 ``[N, H, W, C]`` and ``[M, H, W, C]``; N or M may be 0.
    Raises: UserError if one is not uint8 ``[N, H, W, C]``, or their images differ in shape.
    """
    images = as_images("shared_images", "images", images)
    others = as_images("shared_images", "others", others, tuple(images.shape[1:]))
    known = set(digests(others))
    return torch.tensor([each in known for each in digests(images)], dtype=torch.bool)


def digests(images: Images) -> list[bytes]:
    """A digest of each row's bytes, ``[N, ...]``."""
    parts = (part.cpu().contiguous().numpy() for part in batches(images))
    return [hashlib.blake2b(row, digest_size=16).digest() for part in parts for row in part]


@dataclasses.dataclass(frozen=True)
class SplitDuplicates:
    """The images of a set that occur again in its splits, whole or nearly: what :func:`find_duplicates` returns.

    Args:
        numbers: split -> int64 ``[N]``, number of the distinct image that each one is.
        pairs: of distinct images that are near-duplicates.
        spacing: median distance between an image of the first split and the nearest other one.
    """

    numbers: Mapping[str, Tensor]
    pairs: NearPairs
    spacing: float

    @property
    def threshold(self) -> float:
        """The largest distance of two near-duplicates, in grey levels."""
        return SHARE * self.spacing

    @functools.cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """{"exact", "near"} -> {"train": images of train with another such image there, "val_train": images of val with
        one in train, ...}. Near-duplicates hold byte-equal ones."""
        exact, near = {}, {}
        for which, numbers in self.numbers.items():
            seen = torch.bincount(numbers, minlength=self._count)
            exact[which] = int((seen[numbers] > 1).sum())
            near[which] = int(((seen > 1) | self._beside(seen > 0))[numbers].sum())
        for other, which in self._splits_in_order():
            there = self._mask(other)
            exact[f"{which}_{other}"] = int(there[self.numbers[which]].sum())
            near[f"{which}_{other}"] = int((there | self._beside(there))[self.numbers[which]].sum())
        return {"exact": exact, "near": near}

    def to_drop(self, splits: Collection[str]) -> dict[str, Tensor]:
        """Split -> bool ``[N]``: of ``splits`` the images with a near-duplicate in an earlier split, of others none.

        Those that are dropped from an earlier split do not count there any more.
        """
        remaining = torch.zeros(self._count, dtype=torch.bool)
        masks = {}
        for which, numbers in self.numbers.items():
            mask = (remaining | self._beside(remaining))[numbers]
            masks[which] = mask if which in splits else torch.zeros_like(mask)
            remaining[numbers[~masks[which]]] = True
        return masks

    def rows(self, dropped: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
        """One row for each image and one that it repeats, by split and position; the keys are :data:`COLUMNS`.

        A copy is listed with the first of its kind, and near-duplicates once for all copies of both, of a
        crowd those of its first image. ``dropped``: split -> bool ``[N]``.
        """
        firsts: dict[int, tuple[str, int]] = {}
        for which, numbers in self.numbers.items():
            for index, number in enumerate(numbers.tolist()):
                if (first := firsts.setdefault(number, (which, index))) != (which, index):
                    yield _row((which, index), first, 0.0, False, dropped)
        parts = (getattr(self.pairs, name).split(LISTED) for name in PAIR)
        for part in zip(*parts, strict=True):
            for earlier, later, distance, shifted in zip(*(each.tolist() for each in part), strict=True):
                # Numbers ascend in the order of the splits.
                yield _row(firsts[later], firsts[earlier], distance, shifted, dropped)

    @property
    def _count(self) -> int:
        """Distinct images."""
        return 1 + max(int(numbers.max()) for numbers in self.numbers.values() if len(numbers))

    def _mask(self, which: str) -> Tensor:
        mask = torch.zeros(self._count, dtype=torch.bool)
        mask[self.numbers[which]] = True
        return mask

    def _beside(self, mask: Tensor) -> Tensor:
        """The distinct images that are a near-duplicate of one under the mask."""
        first, second, beside = self.pairs.first, self.pairs.second, torch.zeros_like(mask)
        beside[first[mask[second]]] = True
        beside[second[mask[first]]] = True
        crowds, inside = self.pairs.crowds, self.pairs.crowds >= 0
        crowds, own = crowds[inside], mask[inside].double()
        beside[inside] |= crowds.bincount(own)[crowds] > own
        return beside

    def _splits_in_order(self) -> Iterator[tuple[str, str]]:
        names = list(self.numbers)
        return ((names[k], which) for at, which in enumerate(names) for k in range(at))


def find_duplicates(splits: Mapping[str, Tensor | Any]) -> SplitDuplicates:
    """Find equal images and near-duplicates within splits and across them.

    Two images are near-duplicates if the root mean square difference of the pixels that both have is at most a quarter
    of the median distance between an image of the first split and its nearest neighbour there, moved by at most one
    pixel either way: copies that were compressed again, brightened a little, or cut out a pixel beside. Mirrored and
    turned images are others. Equal images are found by their digests, and all pairs of the distinct ones are decided.

    Args:
        splits: name -> uint8 ``[N, H, W, C]``, in order, the first for training; some may be empty.
    Raises: UserError if one is not uint8 ``[N, H, W, C]``, their images differ in shape, or there is none.
    Source: of the danger: Barz and Denzler, "Do We Train on Test Data?", Journal of Imaging 6 (2020).
    """
    parts: dict[str, Tensor] = {}
    for name, images in splits.items():
        shape = tuple(next(iter(parts.values())).shape[1:]) if parts else None
        parts[name] = as_images("find_duplicates", f"{name} images", images, shape).cpu()
    if not any(map(len, parts.values())):
        fail("find_duplicates", "splits", "hold at least one image", "none")
    return duplicates_by(parts, {name: digests(images) for name, images in parts.items()})


def duplicates_by(parts: Mapping[str, Images], every: Mapping[str, list[bytes]]) -> SplitDuplicates:
    """As :func:`find_duplicates`, of uint8 images on the CPU whose :func:`digests` are known."""
    whole = hashlib.blake2b(digest_size=16)
    for name, each in every.items():
        whole.update(f"{name}/{len(each)}/{parts[name].shape[1:]}".encode() + b"".join(each))
    if (key := whole.digest()) not in _KEPT:
        if len(_KEPT) == MOST_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = _found(parts, every)
    return _KEPT[key]


def _found(parts: Mapping[str, Images], every: Mapping[str, list[bytes]]) -> SplitDuplicates:
    known: dict[bytes, int] = {}
    numbers = {
        name: torch.tensor([known.setdefault(each, len(known)) for each in part], dtype=torch.long)
        for name, part in every.items()
    }
    joined = torch.cat(list(numbers.values()))
    # Of each distinct image the first.
    rows = torch.full((len(known),), len(joined)).scatter_reduce(0, joined, torch.arange(len(joined)), "amin")
    images, training = ImageRows(*parts.values()).rows(rows), next(iter(numbers.values())).unique()
    gap = spacing(images.rows(training)) if len(training) > 1 else 0.0
    return SplitDuplicates(numbers, near_pairs(images, SHARE * gap), gap)


def _row(
    image: tuple[str, int], other: tuple[str, int], distance: float, shifted: bool, dropped: Mapping[str, Tensor]
) -> dict[str, Any]:
    values = (*image, *other, distance, shifted, bool(dropped[image[0]][image[1]]))
    return dict(zip(COLUMNS, values, strict=True))
