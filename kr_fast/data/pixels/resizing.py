"""Images brought to one size, by one function for files and for arrays, so that both give the same bytes.

Pillow's antialiased bilinear filter: a triangle as wide as the reduction, so that every source pixel counts. Its
weights are not negative: black and white stay the ends of the range, where bicubic and Lanczos ring beyond them. From a
reduction by 4 on, whole blocks of pixels are averaged first, to at least twice the size (``reducing_gap`` 2, as in
Pillow's ``thumbnail``): a third faster, the mean of photographs within 0.1 to 0.25 of 255 levels of the triangle alone.
A JPEG is decoded whole: the decoder's own scaling moves pixels by up to 29 levels.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from kr_fast.runtime.errors import fail

GAP = 2.0
CHUNK = 8  # images that a thread takes at a time


def resized(image: Image.Image, size: int, how: str) -> Image.Image:
    """``image`` (mode L or RGB) at ``size`` x ``size``; unchanged if it has that size.

    Args:
        how: ``crop`` takes the largest square about the centre, ``pad`` puts the whole image about the centre of a
            black square, ``stretch`` changes the proportions. Of a square all three do the same.
    """
    width, height = image.size
    if width == height == size:
        return image
    if how == "pad" and width != height:
        scale = size / max(width, height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        square = Image.new(image.mode, (size, size))
        square.paste(_resample(image, inner), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return square
    box = None
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = left, top, left + side, top + side
    return _resample(image, (size, size), box)


def _resample(image: Image.Image, size: tuple[int, int], box: Any = None) -> Image.Image:
    return image.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=GAP)


def resize_images(images: np.ndarray, size: int, how: str) -> np.ndarray:
    """uint8 ``[N, H, W, C]`` at ``size`` x ``size``, in the threads that torch has; the same array if nothing changes.

    Args:
        how: as for :func:`resized`; "" where the images are squares.
    Raises: UserError where ``how`` is "" and they are no squares.
    """
    count, height, width, channels = images.shape
    check_squares(how, count * (height != width), count, f"{height} x {width}")
    if height == width == size:
        return images
    done = np.empty((count, size, size, channels), np.uint8)

    def fill(index: int) -> None:
        image = Image.fromarray(images[index, ..., 0] if channels == 1 else images[index])
        done[index] = np.asarray(resized(image, size, how)).reshape(size, size, channels)

    for _ in in_threads(fill, range(count)):
        pass
    return done


def check_squares(how: str, odd: int, count: int, first: str) -> None:
    """Refuse ``odd`` images of ``count`` that are no squares, of which one has the size ``first``, unless told how."""
    if odd and not how:
        rule = "be crop, pad or stretch where images are no squares"
        fail("data", "resize", rule, f"none for {odd} of {count} (one is {first})")


def in_threads(function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
    """``function`` of each item, in order. Pillow decodes and resizes without Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) <= CHUNK:
        yield from map(function, items)
        return

    def chunk(start: int) -> list[Any]:
        return [function(item) for item in items[start : start + CHUNK]]

    with ThreadPoolExecutor(threads) as pool:
        for results in pool.map(chunk, range(0, len(items), CHUNK)):
            yield from results
