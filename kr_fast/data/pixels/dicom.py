"""One DICOM image, by pydicom: shown as its own window says, and nothing but its pixels.

Only the header of the file and the elements that describe pixels (group 0028) are parsed, so that nothing of a person
can reach a log, a note, an error or a file.
"""

import functools
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from kr_fast.data.pixel_range import WINDOW
from kr_fast.runtime.errors import UserError

PREAMBLE, MAGIC = 128, b"DICM"
GREY, COLOUR = (
    ("MONOCHROME1", "MONOCHROME2"),
    ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
)
OVERLAY = 0x60000010
HEADER = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")


class DicomError(ValueError):
    """Why an image is not read, in words of this module."""


def _in_own_words(function: Callable) -> Callable:
    """``function``, whose errors that pydicom raises keep their type alone: their text may quote bytes of the file."""

    @functools.wraps(function)
    def guarded(content: BinaryIO) -> Any:
        try:
            return function(content)
        except (UserError, DicomError):
            raise
        except Exception as error:
            raise DicomError(f"it is damaged DICOM, of which pydicom raises {type(error).__name__}") from None

    return guarded


def is_dicom(content: BinaryIO) -> bool:
    """Whether ``content``, at its start, is a DICOM file; it is left there."""
    start = content.read(PREAMBLE + len(MAGIC))
    content.seek(0)
    return start[PREAMBLE:] == MAGIC


@_in_own_words
def read_header(content: BinaryIO) -> tuple[int, int, str]:
    """(height, width, ``grey`` or ``colour``) of an image that :func:`decode` can read.

    Raises: DicomError naming what is not read; UserError where pydicom is not installed.
    """
    data = _pydicom().dcmread(content, stop_before_pixels=True, specific_tags=[*HEADER])
    if missing := [name for name in HEADER[:2] if not data.get(name)]:
        raise DicomError(f"it is DICOM without {' and '.join(missing)}, no image")
    photometric = data.get("PhotometricInterpretation")
    if photometric not in (*GREY, *COLOUR):
        raise DicomError("its photometric interpretation is none of those that are read")
    if photometric in COLOUR and photometric != "PALETTE COLOR" and data.get("BitsAllocated") != 8:
        raise DicomError("it is DICOM of more than 8 bits per colour, which is not read")
    _check_syntax(data.file_meta.get("TransferSyntaxUID"))
    return int(data.Rows), int(data.Columns), "grey" if photometric in GREY else "colour"


@_in_own_words
def decode(content: BinaryIO) -> tuple[np.ndarray, list[str]]:
    """(uint8 ``[H, W]`` or ``[H, W, 3]``, keys of ``NOTES`` for what was done).

    Grey: bits beyond BitsStored, an old place of overlays, are cut off; Modality LUT, or RescaleSlope x +
    RescaleIntercept; then the VOI LUT, or the first window of the file (PS3.3, C.11.2.1.2 and C.11.2.1.3: LINEAR,
    LINEAR_EXACT, SIGMOID), else the window from the 0.5 to the 99.5 percentile of the image; 255 - y for MONOCHROME1.
    The first frame is taken.
    Raises: DicomError for damaged files.
    """
    from pydicom import Dataset
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    data = Dataset()
    frames = pixel_array(content, ds_out=data, specific_tags=[OVERLAY], index=0)
    notes = ["frames"] if int(data.get("NumberOfFrames") or 1) > 1 else []
    notes += ["overlays"] if OVERLAY in data else []
    if data.PhotometricInterpretation == "PALETTE COLOR":
        frames = apply_color_lut(frames, data)[..., :3]
        return (frames >> 8).astype(np.uint8) if frames.dtype == np.uint16 else frames, notes
    if data.PhotometricInterpretation not in GREY:
        return frames, notes
    values = apply_modality_lut(_stored(frames, data), data).astype(np.float64)
    pixels, how = _shown(values, data)
    if data.PhotometricInterpretation == "MONOCHROME1":
        pixels, notes = 255 - pixels, [*notes, "inverted"]
    return np.rint(pixels.clip(0, 255)).astype(np.uint8), [*notes, how]


def _stored(frames: np.ndarray, data: Any) -> np.ndarray:
    """The BitsStored below HighBit, with their sign."""
    if frames.dtype.kind == "f" or data.file_meta.TransferSyntaxUID.is_compressed:
        return frames
    width, stored = 8 * frames.dtype.itemsize, int(data.BitsStored)
    above = width - 1 - int(data.get("HighBit", stored - 1))
    if data.BitsAllocated == 1 or not 0 <= above <= width - stored:
        return frames
    return (frames << above) >> (width - stored)


def _shown(values: np.ndarray, data: Any) -> tuple[np.ndarray, str]:
    """(levels in [0, 255] and, before clipping, beyond; key of ``NOTES``)."""
    from pydicom.pixels import apply_voi

    if table := data.get("VOILUTSequence"):
        return apply_voi(values, data) * 255.0 / (2.0 ** int(table[0].LUTDescriptor[2]) - 1), "windowed"
    centre, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = str(data.get("VOILUTFunction") or "LINEAR").upper()
    if centre is not None and width is not None and np.isfinite((centre, width)).all() and width > 0:
        if function == "SIGMOID":
            with np.errstate(over="ignore"):
                return 255 / (1 + np.exp(-4 * (values - centre) / width)), "windowed"
        if function == "LINEAR_EXACT":
            return ((values - centre) / width + 0.5) * 255, "windowed"
        if function == "LINEAR" and width > 1:
            return ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255, "windowed"
        if function == "LINEAR" and width == 1:
            return np.where(values > centre - 0.5, 255.0, 0.0), "windowed"
    low, high = _percentiles(values, data)
    return (values - low) * (255 / (high - low) if high > low else 0), "by percentiles"


def _percentiles(values: np.ndarray, data: Any) -> tuple[float, float]:
    """Of the image without its padding; the whole range where they are equal."""
    padding = _first(data.get("PixelPaddingValue"))
    if padding is not None:
        slope, intercept = (
            float(data.get(name, fill)) for name, fill in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        inside = values[values != padding * slope + intercept]
        values = inside if inside.size else values
    low, high = np.percentile(values, WINDOW, method="inverted_cdf")
    return (low, high) if low < high else (values.min(), values.max())


def _first(value: Any) -> float | None:
    """The first value of an element that may have several, or none."""
    if value is None or isinstance(value, str | bytes):
        return None
    values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    return float(values[0]) if values.size else None


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise UserError(
            "data: DICOM images must have pydicom installed, got none; pip install 'kr-fast[dicom]'"
        ) from error
    return pydicom


def _check_syntax(syntax: Any) -> None:
    """Refuse pixels that no installed package decodes. Raises: DicomError naming the packages that would."""
    from pydicom.pixels import get_decoder

    if syntax is None:
        raise DicomError("it is DICOM without a transfer syntax")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise DicomError("its transfer syntax is not one that pydicom decodes") from None
    if not decoder.is_available:
        needed = "; ".join(decoder.missing_dependencies)
        raise DicomError(f"pydicom does not decode {syntax.name} by itself: install one of {needed}")
