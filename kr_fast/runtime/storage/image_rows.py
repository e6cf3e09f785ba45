"""Images that stay where they are: rows of tensors and of mapped files, gathered a batch at a time.

A set may be larger than memory, so nothing that is done to it may copy it. What a stage does with a set, take a half of
it, leave rows out, join two splits, is done to numbers of rows here; pixels are copied for the rows of a batch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.runtime import memory

BATCH_BYTES = 4 << 20  # of pixels that are taken at a time: 16 MiB as floats
RETURNED_BYTES = 16 << 20  # of pixels, after which memory that batches freed goes back to the system


class MappedFile:
    """uint8 images ``shape`` in a file; pickled by its path, so that each process maps it itself.

    ``lock``: kept for as long as this object is.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], lock: Any = None):
        self.path, self.shape, self._lock = path, shape, lock
        # Copy on write: torch takes writable memory alone, and the file stays as it is.
        array = np.memmap(path, np.uint8, "c", shape=shape) if shape[0] else np.empty(shape, np.uint8)
        self.images = torch.from_numpy(array)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedFile, (self.path, self.shape)


class ImageRows:
    """Rows of one or several uint8 ``[N_k, H, W, C]`` as one set ``[N, H, W, C]``.

    ``images[which]`` copies rows into a tensor (a slice of one part is a view of it), :meth:`rows` selects them without
    a copy; ``which`` is a slice, a mask or indices.

    Args:
        parts: tensors, mapped files or such sets, of one shape and on one device.
    """

    dtype = torch.uint8

    def __init__(self, *parts: "Tensor | MappedFile | ImageRows"):
        self._parts: list[Tensor | MappedFile] = []
        index, count = [], 0
        for part in parts:
            own = part._index if isinstance(part, ImageRows) else torch.arange(len(_images(part)))
            index.append(own + count)
            self._parts += part._parts if isinstance(part, ImageRows) else [part]
            count = sum(len(_images(each)) for each in self._parts)
        self._index = torch.cat(index)  # of all rows of the parts, one after the other

    @property
    def shape(self) -> torch.Size:
        """``[N, H, W, C]``."""
        return torch.Size((len(self._index), *_images(self._parts[0]).shape[1:]))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return _images(self._parts[0]).device

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"ImageRows({list(self.shape)} of {len(self._parts)} parts)"

    def numel(self) -> int:
        """Bytes of all rows."""
        return self.shape.numel()

    def rows(self, which: Any) -> "ImageRows":
        """The rows that ``which`` selects, in its order."""
        chosen = object.__new__(ImageRows)
        chosen._parts, chosen._index = self._parts, self._index[which]
        return chosen

    def __getitem__(self, which: Any) -> Tensor:
        index = self._index[which]
        if index.ndim == 0:
            part, row = self._located(index[None])
            return part[int(row)]
        part, rows = self._located(index)
        if part is not None:
            first, count = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
            if isinstance(which, slice) and torch.equal(rows, torch.arange(first, first + count)):
                return part[first : first + count]
            return part[rows.to(part.device)]
        images, start = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8, device=self.device), 0
        for part in map(_images, self._parts):
            mine = ((index >= start) & (index < start + len(part))).nonzero()[:, 0].to(part.device)
            images[mine] = part[index.to(part.device)[mine] - start]
            start += len(part)
        return images

    def _located(self, index: Tensor) -> tuple[Tensor | None, Tensor]:
        """(the part that all these rows are of, their numbers there); None where they are of several."""
        low, high = (int(index.min()), int(index.max())) if len(index) else (0, -1)
        start = 0
        for part in map(_images, self._parts):
            if start <= low and high < start + len(part):
                return part, index - start
            start += len(part)
        return None, index

    def split(self, size: int) -> Iterator[Tensor]:
        """The rows in order, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def cpu(self) -> "ImageRows":
        """The rows in main memory, or in their files."""
        if self.device.type == "cpu":
            return self
        return ImageRows(*(_images(part).cpu() for part in self._parts)).rows(self._index)

    def to(self, device: torch.device) -> "Tensor | ImageRows":
        """The rows on ``device``: all of them where it is another one."""
        if torch.device(device).type == self.device.type:
            return self
        images, start = torch.empty(self.shape, dtype=torch.uint8, device=device), 0
        for part in batches(self):
            images[start : start + len(part)] = part
            start += len(part)
        return images


Images = Tensor | ImageRows


def _images(part: Tensor | MappedFile) -> Tensor:
    return part.images if isinstance(part, MappedFile) else part


def rows_of(images: Images, which: Any) -> Images:
    """The rows of a set, or of a tensor, that ``which`` selects; of a set without a copy."""
    return images.rows(which) if isinstance(images, ImageRows) else images[which]


def batches(images: Images, most: int = 1 << 30) -> Iterator[Tensor]:
    """The images in order, at most ``most`` at a time, and fewer where these would take more than 4 MiB.

    What is kept of a batch may lie among the memory that the batch frees, where the next one then does not fit: without
    returning it a process would come to hold the whole set.
    """
    seen = 0
    for part in images.split(max(1, min(most, BATCH_BYTES // max(1, images.shape[1:].numel())))):
        yield part
        if (seen := seen + part.numel()) >= RETURNED_BYTES:
            memory.return_freed_memory()
            seen = 0


def hash_images(digest: Any, images: Images) -> None:
    """Feed the bytes of all images to ``digest`` (of :mod:`hashlib`)."""
    for part in batches(images):
        digest.update(part.cpu().contiguous().numpy().data)
