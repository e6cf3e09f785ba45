"""Standard augmentation in two steps: tables of random numbers, one row per image, and their batched application.

Tables are drawn for a whole epoch at a time, so that a training step draws nothing. Flips and whole-pixel shifts are
index arithmetic on uint8 images; rotation, scale and fractional shifts are one affine resampling of the batch.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kr_fast.data.sources import SIZES, to_float
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option
from kr_fast.runtime.storage.image_rows import ImageRows, Images


@dataclasses.dataclass(frozen=True)
class AugmentParams:
    """The random numbers of :meth:`Augment.draw`, one row per image; None for a kind that is off.

    ``flip``: bool ``[N]``; ``move``: int64 ``[N, 2]`` whole pixels (rows, columns); ``matrix``: float32 ``[N, 2, 3]``,
    the affine map from positions of the new image to positions of the old one.
    """

    flip: Tensor | None = None
    move: Tensor | None = None
    matrix: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "AugmentParams":
        """``change`` of each table."""
        return AugmentParams(*(None if t is None else change(t) for t in (self.flip, self.move, self.matrix)))

    def __getitem__(self, rows: Any) -> "AugmentParams":
        return self.map(lambda table: table[rows])

    def to(self, device: torch.device) -> "AugmentParams":
        """The tables on ``device``."""
        return self.map(lambda table: table.to(device))

    @staticmethod
    def stack(parts: "list[AugmentParams]") -> "AugmentParams":
        """Tables of several draws of equal length, ``[len(parts), N, ...]``."""
        return _joined(parts, torch.stack)

    @staticmethod
    def cat(parts: "list[AugmentParams]") -> "AugmentParams":
        """Tables of several draws, one after the other."""
        return _joined(parts, torch.cat)


def _joined(parts: list[AugmentParams], join: Callable[[list[Tensor]], Tensor]) -> AugmentParams:
    columns = zip(*((part.flip, part.move, part.matrix) for part in parts), strict=True)
    return AugmentParams(*(None if column[0] is None else join(column) for column in columns))


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random shift, flip, rotation and scale; everything off by default. A value out of its range is refused.

    Args:
        shift: largest shift in pixels, drawn per image and axis (whole pixels if it is the only one besides ``flip``,
            which is the usual random crop with replicated border; any fraction otherwise).
        flip: mirror half of the images left-right.
        rotate: largest angle in degrees.
        scale: largest relative change of size.
    """

    shift: int = option(0, "largest shift in pixels", least=0, most=SIZES[1])
    flip: bool = option(False, "mirror half of the images")
    rotate: float = option(0.0, "largest angle in degrees", least=0, most=180)
    scale: float = option(0.0, "largest relative change of size", least=0, below=1)

    def __post_init__(self):
        check(self, "Augment")

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> AugmentParams:
        """Tables for ``count`` images of ``size`` (height, width), on the CPU; ``generator`` is a CPU generator.

        Raises: UserError if ``shift`` is as large as the images.
        """
        if self.shift >= min(size):
            fail("Augment", "shift", f"be below the shorter side of the images, {min(size)}", self.shift)
        flip = torch.rand(count, generator=generator) < 0.5 if self.flip else None
        if self.rotate or self.scale:
            return AugmentParams(flip, None, self._matrix(count, size, generator))
        if self.shift:
            return AugmentParams(flip, torch.randint(-self.shift, self.shift + 1, (count, 2), generator=generator))
        return AugmentParams(flip)

    def _matrix(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        draw = torch.rand(4, count, generator=generator).mul_(2).sub_(1)
        return affine_maps(draw, self.rotate, self.scale, self.shift, size)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """``images``: float ``[N, C, H, W]`` -> the same shape. ``generator`` is a CPU generator."""
        params = self.draw(len(images), tuple(images.shape[2:]), generator).to(images.device)
        if params.flip is not None or params.move is not None:
            index = torch.arange(len(images), device=images.device)
            images = gather_augmented(images.permute(0, 2, 3, 1), index, params).permute(0, 3, 1, 2)
        return images if params.matrix is None else resample(images, params.matrix)


def gather_augmented(pool: Images, index: Tensor, params: AugmentParams) -> Tensor:
    """``pool[index]`` with the flips and moves of ``params``: ``[P, H, W, C]`` -> ``[N, H, W, C]``, borders replicated.

    An image is mirrored first, then moved.
    """
    if isinstance(pool, ImageRows):
        pool, index = pool[index], torch.arange(len(index))
        if params.flip is None and params.move is None:
            return pool
    if params.flip is None and params.move is None:
        return pool[index]
    height, width = pool.shape[1:3]
    rows = torch.arange(height, device=pool.device)[None]
    columns = torch.arange(width, device=pool.device)[None]
    if params.move is not None:
        rows = (rows + params.move[:, :1]).clamp_(0, height - 1)
        columns = (columns + params.move[:, 1:]).clamp_(0, width - 1)
    if params.flip is not None:
        columns = torch.where(params.flip[:, None], width - 1 - columns, columns)
    return pool[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def resample(images: Tensor, matrix: Tensor) -> Tensor:
    """float ``[N, C, H, W]`` where ``matrix`` ``[N, 2, 3]`` sends the grid to, bilinear, same borders."""
    grid = torch.nn.functional.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def augmented(pool: Images, index: Tensor, params: AugmentParams) -> Tensor:
    """Images ``pool[index]`` augmented by ``params``: uint8 ``[P, H, W, C]`` -> float32 ``[N, C, H, W]`` in [-1, 1]."""
    x = to_float(gather_augmented(pool, index, params))
    return x if params.matrix is None else resample(x, params.matrix)


def affine_maps(draw: Tensor, rotate: float, scale: float, shift: int, size: tuple[int, int]) -> Tensor:
    """float32 ``[N, 2, 3]``, the maps of :func:`resample`, of images of ``size``.

    ``draw``: ``[4, N]`` in [-1, 1], shares of the largest angle (``rotate``, in degrees), change of ``scale``, and
    ``shift`` in pixels across and down.
    """
    height, width = size
    angle, scales = draw[0] * (rotate * math.pi / 180), 1 + draw[1] * scale
    matrix = torch.zeros(draw.shape[1], 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = scales * angle.cos()
    matrix[:, 1, 0] = scales * angle.sin() * (width / height)  # positions are in halves of a side
    matrix[:, 0, 1] = -scales * angle.sin() * (height / width)
    matrix[:, 0, 2] = draw[2] * (2 * shift / width)
    matrix[:, 1, 2] = draw[3] * (2 * shift / height)
    return matrix
