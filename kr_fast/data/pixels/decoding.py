"""One image file: its header, and its pixels as 8 bit of one size.

Grey stays one channel, everything else becomes RGB. Alpha is composed on white, an EXIF orientation is applied.
"""

import contextlib
import dataclasses
import io
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kr_fast.data.packed import ImageFile, Packed
from kr_fast.data.pixels import dicom, jpeg
from kr_fast.data.pixels.resizing import resize
from kr_fast.data.pixels.views import view
from kr_fast.runtime.array_files import DAMAGE
from kr_fast.runtime.errors import UserError, first_line

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # by content; EPS would start another program
# Kind of an image -> dtype of its pixels as they are decoded. The deep ones become uint8 by one rule for all images.
DTYPES = {"grey": np.uint8, "colour": np.uint8, "16-bit grey": np.int32, "16-bit colour": np.uint8, "float": np.float32}
DEEP = ("16-bit grey", "float")
ORIENTATION = 0x0112  # tag of EXIF and TIFF
PHOTOMETRIC, BITS, PLANES, SIGNS = 0x0106, 0x0102, 0x011C, 0x0153  # tags of TIFF
MOST_PIXELS = 1 << 26  # of an image that is resized: 256 MiB in colour for each thread
START = 1 << 12  # bytes of a JPEG that are read for its header, if it is there
WHOLE = 1 << 24  # bytes of a file up to which it is read at once
NOTES = {
    "alpha": "alpha composed on white in {}",
    "turned": "EXIF orientation applied to {}",
    "frames": "the first frame alone read of {}",
    "deep": "the high byte read of {} of 16-bit colour",
    "windowed": "the file's own window applied to {} of DICOM",
    "by percentiles": "the image's own window, its 0.5 to 99.5 percentile, applied to {} of DICOM without one",
    "inverted": "{} of DICOM inverted (MONOCHROME1)",
    "overlays": "overlays of {} not read",
    "coloured": "{} of grey read as RGB",
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
    def area(self) -> int:
        """Number of pixels."""
        return self.height * self.width


@dataclasses.dataclass(frozen=True)
class Form:
    """What all images of a set become: ``channels`` of them, and ``size`` by ``how`` where they are resized (not 0)."""

    channels: int
    size: int = 0
    how: str = ""


class UnreadableError(Exception):
    """Why one file cannot be read."""


def read_header(file: ImageFile, limit: int = 0) -> Header:
    """Size and kind of the image in ``file``, of which no pixel is decoded.

    Args:
        limit: number of pixels above which it is refused; 0: none but Pillow's.
    Raises: UnreadableError.
    """
    is_jpeg = not isinstance(file, Packed) and str(file).lower().endswith((".jpg", ".jpeg"))
    if is_jpeg and (plain := _plain_jpeg(io.BytesIO(_start(file)), limit)):
        return plain
    with _content(file, whole=False) as content:
        if dicom.is_dicom(content):
            height, width, kind = dicom.read_header(content)
            _check_pixels(height, width, limit)
            return Header(height, width, kind)
        if plain := _plain_jpeg(content, limit):
            return plain
        with Image.open(content, formats=FORMATS) as image:  # which goes to its start
            width, height = image.size
            _check_pixels(height, width, limit)
            # Pillow turns a TIFF itself, and would decode a PNG to look for an orientation behind its pixels.
            known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            if known and _orientation(image) in (5, 6, 7, 8):
                width, height = height, width
            return Header(height, width, _kind(image))


def _plain_jpeg(content: BinaryIO, limit: int) -> Header | None:
    """The header of a plain JPEG that starts at the start of ``content``; None for anything else."""
    if dicom.is_dicom(content) or not (plain := jpeg.plain_header(content)) or plain[0] * plain[1] > MOST_PIXELS:
        return None
    height, width, channels = plain
    _check_pixels(height, width, limit)
    return Header(height, width, "grey" if channels == 1 else "colour")


def _start(file: Path) -> bytes:
    """The first bytes of ``file``, none where it cannot be read: reading it whole will say why.

    By three calls of the system, as each gives Python's lock away, which threads then have to wait for.
    """
    try:
        number = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(number, START)
    except OSError:
        return b""
    finally:
        os.close(number)


def _check_pixels(height: int, width: int, limit: int) -> None:
    if limit and width * height > limit:
        raise UnreadableError(f"its header claims {height} x {width} pixels, more than {limit / 1e6:.0f} million")


def decode_deep(file: ImageFile, header: Header) -> tuple[np.ndarray, list[str]]:
    """(pixels ``[H, W, 1]`` of an image of 16 bits or floats, keys of ``NOTES``). Raises: UnreadableError."""
    notes: list[str] = []
    with _content(file) as content, _decoded(content, header, notes) as image:
        pixels = _deep(image, header.kind, notes)
    return pixels, notes


def decode(file: ImageFile, header: Header, form: Form, out: np.ndarray) -> list[str]:
    """Decode an image of 8 bits into ``out``, uint8 ``[H, W, C]``; keys of ``NOTES`` for what was done.

    Raises: UnreadableError.
    """
    notes: list[str] = []
    mode = "RGB" if form.channels == 3 else "L"
    with _content(file) as content:
        if dicom.is_dicom(content):
            shown, notes = dicom.decode(content)
            if shown.shape[:2] != (header.height, header.width):
                raise ValueError(f"its header says {header}, its pixels are {shown.shape[0]} x {shown.shape[1]}")
            image = Image.fromarray(shown)
            fit(image if image.mode == mode else image.convert(mode), form, out, notes)
        else:
            with _decoded(content, header, notes) as image:
                fit(_flat(image, header.kind, mode, notes), form, out, notes)
    if form.channels == 3 and header.kind == "grey":
        notes.append("coloured")
    return notes


def fit(image: Image.Image, form: Form, out: np.ndarray, notes: list[str]) -> None:
    """An image of mode L or RGB into ``out``, in the size of ``form``."""
    if not form.size or image.size == (form.size, form.size):
        out[...] = np.asarray(image).reshape(out.shape)
        return
    notes += ["resized", "enlarged"] if max(image.size) < form.size else ["resized"]
    pixels, owner = view(image)
    resize(pixels, out, form.how)
    del owner


@contextlib.contextmanager
def _decoded(content: BinaryIO, header: Header, notes: list[str]) -> Iterator[Image.Image]:
    """The upright image, decoded."""
    # Of a path, Pillow maps uncompressed TIFFs into memory, and turned ones wrongly.
    with Image.open(content, formats=FORMATS) as image:
        turned = image.format == "TIFF" and _orientation(image) != 1  # unknown once it is loaded
        image.load()
        upright = image
        if turned or _orientation(image) != 1:
            notes.append("turned")
            upright = ImageOps.exif_transpose(image)
        if (upright.height, upright.width) != (header.height, header.width):
            raise ValueError(f"its header says {header}, its pixels are {upright.height} x {upright.width}")
        yield upright
        # Read last: Pillow seeks to the end and back, and forgets the pixels. MPO is a photo with its preview.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            notes.append("frames")


def _kind(image: Image.Image) -> str:
    if image.format == "TIFF":
        _check_tiff(image)
    if image.mode.startswith("I"):
        return "16-bit grey"
    if image.mode == "F":
        return "float"
    if image.mode in ("1", "L", "LA", "La"):
        return "grey"
    return "16-bit colour" if ";16" in str(image.tile[:1]) else "colour"


def _check_tiff(image: Any) -> None:
    """Refuse what Pillow decodes to other pixels than the file holds."""
    tags = image.tag_v2
    bits = max(tags.get(BITS, (1,)))
    if image.mode.startswith("I") and tags.get(PHOTOMETRIC) == 0:
        raise ValueError("it is a 16-bit TIFF whose white is 0, which is not read")
    if bits > 8 and tags.get(PLANES) == 2 and len(image.getbands()) > 1:
        raise ValueError("it is a TIFF of 16-bit colour in separate planes, which is not read")
    if bits <= 8 and 2 in tags.get(SIGNS, ()):
        raise ValueError("it is a TIFF of signed 8-bit pixels, which is not read")


def _deep(image: Image.Image, kind: str, notes: list[str]) -> np.ndarray:
    pixels = np.array(image, dtype=DTYPES[kind])[..., None]
    clear = image.info.get("transparency")
    if clear is not None and (pixels == clear).any():
        notes.append("alpha")
        pixels[pixels == clear] = 65535
    return pixels


def _flat(image: Image.Image, kind: str, mode: str, notes: list[str]) -> Image.Image:
    """The image in ``mode`` (L or RGB), composed on white."""
    alpha = None
    if image.info.get("transparency") is None and image.mode not in ("LA", "La", "RGBA", "RGBa", "PA"):
        flat = image if image.mode == mode else image.convert(mode)
    else:
        whole = np.asarray(image.convert(f"{mode}A"))
        pixels, alpha = whole[..., :-1], whole[..., -1:].astype(np.int32)
        if (alpha < 255).any():
            notes.append("alpha")
            # Rounded: 255 is odd, so there are no halves.
            pixels = ((pixels * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        flat = Image.fromarray(np.ascontiguousarray(pixels if mode == "RGB" else pixels[..., 0]))
    if kind == "16-bit colour":
        notes += ["deep", "bright"] if _largest(image, mode) > 127 else ["deep"]
    return flat


def _largest(image: Image.Image, mode: str) -> int:
    """The largest sample, alpha left out."""
    return max(high for _, high in (image if image.mode == mode else image.convert(mode)).getextrema()[:3])


def _orientation(image: Image.Image) -> Any:
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in range(2, 9) else 1


@contextlib.contextmanager
def _content(file: ImageFile, whole: bool = True) -> Iterator[BinaryIO]:
    """The bytes of ``file``, read at once if ``whole``. Raises: UnreadableError for whatever goes wrong meanwhile."""
    try:
        with _bytes(file, whole) as content:
            yield content
    except UserError:
        raise
    except UnidentifiedImageError as error:
        why = "it is empty" if _is_empty(file) else f"it holds no {', '.join(FORMATS)} or DICOM image"
        raise UnreadableError(why) from error
    except Image.DecompressionBombError as error:
        raise UnreadableError("its header claims more pixels than Pillow opens") from error
    except PILLOW_ERRORS as error:
        raise UnreadableError(getattr(error, "strerror", None) or first_line(error)) from error


def _bytes(file: ImageFile, whole: bool) -> BinaryIO:
    if isinstance(file, Packed):
        return io.BytesIO(file.content())
    raw = io.FileIO(file, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # waits for no pipe
    status = os.fstat(raw.fileno())
    if not stat.S_ISREG(status.st_mode):
        raw.close()
        raise ValueError("it is no regular file")
    if not whole or status.st_size > WHOLE:
        return io.BufferedReader(raw)
    with raw:  # in one call: each gives Python's lock away, and has to wait for it
        return io.BytesIO(raw.read(status.st_size))


def _is_empty(file: ImageFile) -> bool:
    return not file.content() if isinstance(file, Packed) else os.path.getsize(file) == 0
