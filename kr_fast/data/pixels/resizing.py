"""Images brought to one size, by one function for files and for arrays, so that both give the same bytes.

An antialiased bilinear filter: a triangle as wide as the reduction, so that every source pixel counts. Its weights are
not negative: black and white stay the ends of the range, where bicubic and Lanczos ring beyond them. The arithmetic is
of whole numbers: compiled or not, all give the same bytes, each within 0.6 levels of the exact filter. A JPEG is
decoded whole: the decoder's own scaling moves pixels by up to 29 levels.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from kr_fast.backends import native, registry
from kr_fast.data.printable import counted
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger

COMPILED = getattr(native.cpu, "resize_image", None)  # None where the module cannot be loaded, or is older
CHUNK = 8  # images that a thread takes at a time
ONE, BETWEEN, LAST = 1 << 14, 1 << 8, 1 << 20  # a weight of 1; divisors of the sums of rows, and of columns


def resize(pixels: np.ndarray, out: np.ndarray, how: str) -> None:
    """Bring ``pixels`` to the size of ``out``.

    Args:
        pixels: uint8 ``[H, W, K]``; channels beyond those of ``out`` are not used.
        out: uint8 ``[S, S, C]``, contiguous, which is filled.
        how: ``crop`` takes the largest square about the centre, ``pad`` puts the whole image about the centre of a
            black square, ``stretch`` changes the proportions. Of a square all three do the same.
    """
    height, width, channels = pixels.shape
    if how == "pad" and width != height:
        scale = len(out) / max(width, height)
        inner = [max(1, round(side * scale)) for side in (height, width)]
        top, left = ((len(out) - side) // 2 for side in inner)
        out[...] = 0
        out = out[top : top + inner[0], left : left + inner[1]]
    if how == "crop":
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    rows, columns = _axis(len(pixels), len(out)), _axis(pixels.shape[1], out.shape[1])
    if COMPILED is None:
        _say_slow()
        out[...] = resized_reference(pixels, rows, columns)[..., : out.shape[2]]
        return
    if pixels.strides[1:] != (channels, 1):
        pixels = np.ascontiguousarray(pixels)
    addresses = {"pixels": _address(pixels), "stride": pixels.strides[0], "channels": channels}
    addresses |= {"out": _address(out), "out_stride": out.strides[0], "out_channels": out.shape[2]}
    COMPILED(addresses | rows.rows | columns.columns)


@functools.cache
def _say_slow() -> None:
    reason = registry.unavailable("cpu") or "kr_fast._cpu is older than this version; build it again"
    logger.warning("data: images are brought to one size by numpy, several times slower: %s", reason)


class Axis:
    """How ``to`` pixels come of ``size``: output ``i`` is the sum of ``weights[i, k] / ONE`` of input ``first[i] + k``.

    ``w(j) = max(0, 1 - |j + 0.5 - c| / r)`` of input ``j``, with ``c = (i + 0.5) size / to`` and
    ``r = max(1, size / to)``, over the sum of these; rounded are their cumulative sums.
    """

    def __init__(self, size: int, to: int):
        ratio = size / to
        reach = max(1.0, ratio)
        centres = (np.arange(to) + 0.5) * ratio
        taps = min(size, int(2 * reach) + 1)
        self.first = np.clip(np.floor(centres - reach + 0.5).astype(np.int64), 0, size - taps)
        at = self.first[:, None] + np.arange(taps)
        exact = (1 - np.abs(at + 0.5 - centres[:, None]) / reach).clip(0)
        below = np.cumsum(exact, 1)
        self.weights = np.diff(np.rint(below * (ONE / below[:, -1:])), axis=1, prepend=0).astype(np.int16)
        numbers = {"from": size, "to": to, "taps": taps, "first": _address(self.first)}
        numbers["weights"] = _address(self.weights)
        # Names are compared by their addresses.
        self.rows, self.columns = (
            {sys.intern(f"{axis}_{key}"): number for key, number in numbers.items()} for axis in ("rows", "columns")
        )


_axis = functools.lru_cache(maxsize=4096)(Axis)


def resized_reference(pixels: np.ndarray, rows: Axis, columns: Axis) -> np.ndarray:
    """uint8 ``[H', W', K]`` of ``[H, W, K]``: the definition, which the compiled function gives bit for bit."""
    lines = _weighted(pixels, rows, BETWEEN)
    return _weighted(lines.swapaxes(0, 1), columns, LAST).swapaxes(0, 1).astype(np.uint8)


def _weighted(lines: np.ndarray, axis: Axis, divisor: int) -> np.ndarray:
    """Exact: all are whole numbers below 2^53."""
    pairs = zip(axis.first, axis.weights, strict=True)
    sums = [np.tensordot(w, lines[at : at + len(w)].astype(np.float64), 1) for at, w in pairs]
    return np.floor(np.stack(sums) / divisor + 0.5)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def resize_images(images: np.ndarray, size: int, how: str) -> np.ndarray:
    """uint8 ``[N, H, W, C]`` at ``size`` x ``size``, in the threads that torch has; the same array if nothing changes.

    Args:
        how: as for :func:`resize`; "" where the images are squares.
    Raises: UserError where ``how`` is "" and they are no squares.
    """
    count, height, width, channels = images.shape
    check_squares(how, count * (height != width), count, f"{height} x {width}")
    if height == width == size:
        return images
    done = np.empty((count, size, size, channels), np.uint8)

    def fill(index: int) -> None:
        resize(images[index], done[index], how)

    for _ in in_threads(fill, range(count)):
        pass
    return done


def note_of_sizes(count: int, smallest: tuple[int, int], largest: tuple[int, int], how: str, enlarged: int) -> str:
    """What was done, for a reader: ``smallest`` and ``largest`` are (height, width) of images as they were."""
    ends = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in (smallest, largest)))
    text = f"{counted(count, 'image')} of {ends} brought to one size" + (f" by {how}" if how else "")
    return text + (f", {enlarged} of them enlarged" if enlarged else "")


def check_squares(how: str, odd: int, count: int, first: str) -> None:
    """Refuse ``odd`` images of ``count`` that are no squares, of which one has the size ``first``, unless told how."""
    if odd and not how:
        rule = "be crop, pad or stretch where images are no squares"
        fail("data", "resize", rule, f"none for {odd} of {count} (one is {first})")


def in_threads(function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
    """``function`` of each item, in order. Pillow decodes, and ``resize`` works, without Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) <= CHUNK:
        yield from map(function, items)
        return

    def chunk(start: int) -> list[Any]:
        return [function(item) for item in items[start : start + CHUNK]]

    with ThreadPoolExecutor(threads) as pool:
        for results in pool.map(chunk, range(0, len(items), CHUNK)):
            yield from results
