"""Image files: their headers, checked over all files before one is decoded; then their pixels.

Grey stays one channel, everything else becomes RGB. Alpha is composed on white, an EXIF orientation is applied.
"""

import contextlib
import dataclasses
import io
import os
import stat
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kr_fast.data.packed import ImageFile, Packed
from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.splits import check_size
from kr_fast.runtime.array_files import DAMAGE
from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.memory import free_memory

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # by content; EPS would start another program
DTYPES = {"grey": np.uint8, "colour": np.uint8, "16-bit grey": np.int32, "16-bit colour": np.uint8, "float": np.float32}
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags of EXIF and TIFF
NOTES = {
    "alpha": "alpha composed on white in {}",
    "turned": "EXIF orientation applied to {}",
    "frames": "the first frame alone read of {}",
    "deep": "the high byte read of {} of 16-bit colour",
}
# What Pillow raises on damaged files, beside a reader's usual errors.
PILLOW_ERRORS = (*DAMAGE, MemoryError, LookupError, ArithmeticError, AttributeError, AssertionError, struct.error)


@dataclasses.dataclass(frozen=True)
class Header:
    """Height, width and kind (of ``DTYPES``) of an image as it will be read."""

    height: int
    width: int
    kind: str

    def __str__(self) -> str:
        return f"{self.height} x {self.width} {self.kind}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.height, self.width, 3 if "colour" in self.kind else 1


class _UnreadableError(Exception):
    """Why one file cannot be read."""


def read(parts: dict[str, list[ImageFile]], sizes: tuple[int, int] | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Pixels ``[N, H, W, C]`` of the files of each split, all of one dtype; and notes, in numbers, on what was done.

    Args:
        sizes: least and greatest height and width; None for any.
    Raises: UserError for files that cannot be read, are of several sizes or kinds, or do not fit sizes or the memory.
    """
    every = [file for part in parts.values() for file in part]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow on odd metadata, and on sizes that are refused here
        header = _common(every, _each(every, read_header))
        check_size(header.height, header.width, sizes)
        dtype = np.dtype(DTYPES[header.kind])
        need, free = len(every) * int(np.prod(header.shape)) * dtype.itemsize, free_memory()
        if need > free:
            got = f"{counted(len(every), 'image')} of {header}, {need >> 20} MiB where {free >> 20} MiB are free"
            fail("data", "all images together", "fit the memory", got)
        pixels = {which: np.empty((len(part), *header.shape), dtype) for which, part in parts.items()}
        rows = iter([row for images in pixels.values() for row in images])
        notes: Counter = Counter()

        def fill(file: ImageFile) -> None:
            row = next(rows)
            row[...], done = decode(file, header)
            notes.update(done)

        _each(every, fill)
    if header.kind == "16-bit colour" and not notes.pop("bright", 0):
        remedy = "scale their samples so that white is 65535"
        fail("data", "images of 16-bit colour", "use their 16 bits", f"none with a sample above 32767 ({remedy})")
    return pixels, [text.format(counted(notes[key], "image")) for key, text in NOTES.items() if notes[key]]


def read_header(file: ImageFile) -> Header:
    """Size and kind of the image in ``file``, of which no pixel is decoded."""
    with _opened(file) as image:
        width, height = image.size
        # Pillow turns a TIFF itself, and would decode a PNG to look for an orientation behind its pixels.
        known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        if known and _orientation(image) in (5, 6, 7, 8):
            width, height = height, width
        return Header(height, width, _kind(image))


def decode(file: ImageFile, header: Header) -> tuple[np.ndarray, list[str]]:
    """(pixels ``[H, W, C]``, keys of ``NOTES`` for what was done to them)."""
    notes = []
    with _opened(file) as image:
        turned = image.format == "TIFF" and _orientation(image) != 1  # unknown once it is loaded
        image.load()
        upright = image
        if turned or _orientation(image) != 1:
            notes.append("turned")
            upright = ImageOps.exif_transpose(image)
        pixels = _pixels(upright, header.kind, notes)
        if pixels.shape != header.shape:
            raise ValueError(f"its header says {header}, its pixels are {list(pixels.shape)}")
        # Read last: Pillow seeks to the end and back. MPO is a photo with its preview.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            notes.append("frames")
    return pixels, notes


def _kind(image: Image.Image) -> str:
    if image.mode.startswith("I"):
        if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:
            raise ValueError("it is a 16-bit TIFF whose white is 0, which is not read")
        return "16-bit grey"
    if image.mode == "F":
        return "float"
    if image.mode in ("1", "L", "LA", "La"):
        return "grey"
    return "16-bit colour" if ";16" in str(image.tile[:1]) else "colour"


def _pixels(image: Image.Image, kind: str, notes: list[str]) -> np.ndarray:
    clear = image.info.get("transparency")
    if kind in ("16-bit grey", "float"):
        pixels = np.array(image, dtype=DTYPES[kind])[..., None]
        if clear is not None and (pixels == clear).any():
            notes.append("alpha")
            pixels[pixels == clear] = 65535
        return pixels
    colour = "RGB" if "colour" in kind else "L"
    if clear is None and image.mode not in ("LA", "La", "RGBA", "RGBa", "PA"):
        pixels = np.asarray(image.convert(colour)).reshape(image.height, image.width, -1)
    else:
        whole = np.asarray(image.convert(f"{colour}A")).astype(np.int32)
        pixels, alpha = whole[..., :-1], whole[..., -1:]
        if (alpha < 255).any():
            notes.append("alpha")
    if kind == "16-bit colour":
        notes += ["deep", "bright"] if pixels.max() > 127 else ["deep"]
    if "alpha" in notes:
        pixels = (pixels * alpha + 255 * (255 - alpha) + 127) // 255  # rounded: 255 is odd, so there are no halves
    return pixels


def _orientation(image: Image.Image) -> Any:
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in range(2, 9) else 1


@contextlib.contextmanager
def _opened(file: ImageFile) -> Iterator[Image.Image]:
    """The image in ``file``. Raises: _UnreadableError for whatever goes wrong meanwhile."""
    try:
        # Of a path, Pillow maps uncompressed TIFFs into memory, and turned ones wrongly.
        with _bytes(file) as content, Image.open(content, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        why = "it is empty" if _is_empty(file) else f"it holds no {', '.join(FORMATS[:-1])} or PPM image"
        raise _UnreadableError(why) from error
    except Image.DecompressionBombError as error:
        raise _UnreadableError("its header claims more pixels than Pillow opens") from error
    except PILLOW_ERRORS as error:
        raise _UnreadableError(getattr(error, "strerror", None) or first_line(error)) from error


def _bytes(file: ImageFile) -> BinaryIO:
    if isinstance(file, Packed):
        return io.BytesIO(file.content())
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")
    return open(file, "rb")


def _is_empty(file: ImageFile) -> bool:
    return not file.content() if isinstance(file, Packed) else os.path.getsize(file) == 0


def _short(file: ImageFile) -> str:
    return printable(file if isinstance(file, Packed) else f"{file.parent.name}/{file.name}")


def _each(files: list[ImageFile], function: Callable[[Path], Any]) -> list[Any]:
    """``function`` of all files. Raises: UserError naming those that cannot be read."""
    done, failed = [], []
    for file in files:
        try:
            done.append(function(file))
        except _UnreadableError as error:
            failed.append((file, error))
    if failed:
        got = listed("", [f"{file} ({error})" for file, error in failed])
        if len(failed) == 1:
            raise UserError(f"data: image must be readable, got {got}") from failed[0][1]
        raise UserError(f"data: every image must be readable, got {len(failed)} that are not: {got}")
    return done


def _common(files: list[ImageFile], headers: list[Header]) -> Header:
    """The header that all have."""
    (usual, count), *others = Counter(headers).most_common()
    if others:
        parts = [f"{count} of {usual}"]
        for other, count in others[:3]:
            names = [_short(f) for f, h in zip(files, headers, strict=True) if h == other]
            parts.append(f"{count} of {other} ({listed('', names)})")
        if len(others) > 3:
            parts.append(f"{len(others) - 3} more")
        remedy = "bring them to one size and mode first, as ImageOps.fit(image.convert('L'), (28, 28)) of Pillow does"
        fail("data", "every image", "have one size and one mode", f"{', '.join(parts)}; {remedy}")
    return usual
