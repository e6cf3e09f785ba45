"""One rule for the range and the depth of pixels, decided once over all splits together.

A set has one value of white: 1, 255 or 65535. It is taken only where nothing else can be meant; the rule stands in
docs/data.md. What is ambiguous (12-bit values, [-1, 1], standardised pixels) is refused with the remedy.
"""

import dataclasses
from typing import NoReturn

import numpy as np

from kr_fast.runtime.errors import fail

OVERSHOOT = 0.1  # of white: how far resampling may go beyond black and white
CENTRED = 0.25  # share of pixels that clipping may change; more are not overshoot
DARK = 1 / 16  # of white: a split or a set whose largest pixel is below it is on another scale
CONTRAST = 32  # of 255: pixels that span less are a warning
BLOCK = 1 << 22  # pixels converted at a time
SCALE = "scale them to 8 bit, np.round(x * (255 / white)).astype(np.uint8) with white = 4095 for 12 bit"


@dataclasses.dataclass(frozen=True)
class _Range:
    """The range of one split; ``low`` and ``high`` are exact."""

    name: str
    dtype: np.dtype
    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]" if self.dtype.kind == "f" else f"[{self.low}, {self.high}]"


def to_uint8(parts: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """uint8 pixels of all splits by one rule.

    ``round(x * 255 / white)``, half to even, in float64, clipped to [0, 255].

    Args:
        parts: name of the argument -> images of any shape; bool, integers or floats.
    Returns: (the images, notes on what was done, warnings).
    Raises: UserError where the range is not certain, pixels are not finite, or splits differ in scale.
    """
    ranges = [_range(name, images) for name, images in parts.items() if images.size]
    if not ranges:
        return {name: images.astype(np.uint8) for name, images in parts.items()}, [], []
    low, high = min(ranges, key=lambda each: each.low), max(ranges, key=lambda each: each.high)
    white = _white(ranges, low, high)
    _one_scale(ranges, high, white)
    pixels, clipped, changed = {}, 0, 0
    for name, images in parts.items():
        pixels[name], outside, moved = _converted(images, white)
        clipped, changed = clipped + outside, changed + moved
    total = sum(images.size for images in parts.values())
    if changed > CENTRED * total:
        remedy = "shift and scale them so that 0 is black and 1 or 255 white"
        fail("data", low.name, f"lie in [0, {white}]", f"{changed} of {total} pixels beyond it ({remedy})")
    note = _words(ranges, low.low, high.high, white)
    if clipped:
        ends = f"the lowest {low.low:g}, the highest {high.high:g}" if changed else "by rounding only"
        note += f", {clipped} of {total} pixels beyond [0, {white}] clipped ({ends})"
    span = (min(high.high, white) - max(low.low, 0)) * 255 / white
    warnings = []
    if 0 < span < CONTRAST:
        ends = f"[{max(low.low, 0):g}, {high.high:g}] of [0, {white}]"
        bright = high.high > white / 2
        meant = "their contrast is low" if bright else f"if {high.high:g} is white, divide by it first"
        warnings.append(f"pixels span only {ends}: {meant}")
    return pixels, [note], warnings


def _range(name: str, images: np.ndarray) -> _Range:
    if images.dtype.kind not in "biuf":
        fail("data", name, "be integers in [0, 255], or floats in [0, 1] or [0, 255]", images.dtype)
    low, high = images.min().item(), images.max().item()
    if images.dtype.kind == "f" and not np.isfinite((low, high)).all():
        fail("data", name, "hold finite pixels", f"{int((~np.isfinite(images)).sum())} that are not")
    return _Range(name, images.dtype, *((int(low), int(high)) if images.dtype.kind == "b" else (low, high)))


def _white(ranges: list[_Range], low: _Range, high: _Range) -> int:
    """The value of white: 1, 255 or 65535."""
    floats = any(each.dtype.kind == "f" for each in ranges)
    if not floats:
        return _white_of_integers(ranges, low, high)
    if low.low >= -OVERSHOOT and high.high <= 1 + OVERSHOOT:
        if 0 < high.high < DARK:
            _refuse(high, "divide them by the value of white; by 255 they may have been divided twice")
        return 1
    if low.low >= -255 * OVERSHOOT and 128 <= high.high <= 255 * (1 + OVERSHOOT):
        return 255
    if low.low < 0:
        centred = low.low >= -1.25 and high.high <= 1.25
        undo = "(x + 1) / 2 makes [0, 1] of [-1, 1]" if centred else "undo their standardisation: x * std + mean"
        _refuse(low, undo)
    if high.high <= 1.5:
        _refuse(high, "np.clip(x, 0, 1) if white is 1")
    _refuse(high, "divide them by the value of white, or cast them to uint8 if white is 255")


def _white_of_integers(ranges: list[_Range], low: _Range, high: _Range) -> int:
    if low.low < 0:
        remedy = "x.view(np.uint8) if they were uint8 once" if low.dtype == np.int8 else "choose a window and " + SCALE
        _refuse(low, remedy)
    if all(each.dtype.kind == "b" for each in ranges):
        return 1
    if high.high == 1:
        each = next(each for each in ranges if each.dtype.kind != "b")
        got = f"{each.dtype} in {each} (multiply them by 255, or store them as bool)"
        fail("data", each.name, "hold more values than 0 and 1, unless they are bool", got)
    if high.high <= 255:
        return 255
    if 1 << 15 <= high.high < 1 << 16:
        return 65535  # nothing but 16 bits holds it; a smaller value could be 9 to 15 bits, or a dark image of 16
    _refuse(high, SCALE)


def _refuse(bad: _Range, remedy: str) -> NoReturn:
    kinds = "integers in [0, 255] or of full 16 bits" if bad.dtype.kind != "f" else "floats in [0, 1] or [0, 255]"
    fail("data", bad.name, f"be {kinds}", f"{bad.dtype} in {bad} ({remedy})")


def _one_scale(ranges: list[_Range], high: _Range, white: int) -> None:
    """Refuse a split that would come out black beside the others: it is on another scale."""
    certain = all(each.dtype == np.uint8 for each in ranges)
    for each in ranges:
        if 0 < each.high < (2 if certain else white * DARK):
            rule = f"be on the scale of {high.name}, which lie in {high}"
            fail("data", each.name, rule, f"{each.dtype} in {each} (bring all splits to one scale)")


def _converted(images: np.ndarray, white: int) -> tuple[np.ndarray, int, int]:
    """(uint8 images, pixels beyond [0, white], those of them that are beyond by more than half a grey level)."""
    if white == 255 and images.dtype == np.uint8:
        return np.ascontiguousarray(images), 0, 0
    pixels = np.empty(images.shape, np.uint8)
    rows = max(1, BLOCK // max(1, images[:1].size))
    clipped = changed = 0
    for start in range(0, len(images), rows):
        levels = images[start : start + rows].astype(np.float64)
        levels = levels / 257 if white == 65535 else levels * (255 // white)
        clipped += int(((levels < 0) | (levels > 255)).sum())
        changed += int(((levels < -0.5) | (levels > 255.5)).sum())
        pixels[start : start + rows] = np.clip(np.rint(levels), 0, 255)
    return pixels, clipped, changed


def _words(ranges: list[_Range], low: float, high: float, white: int) -> str:
    dtype = "/".join(sorted({str(each.dtype) for each in ranges}))
    if white == 65535:
        return f"{dtype} pixels, the largest {high}, divided by 257"
    if white == 1:
        return f"{dtype} pixels{'' if dtype == 'bool' else ' in [0, 1]'}, times 255"
    if any(each.dtype.kind == "f" for each in ranges):
        return f"{dtype} pixels in [0, 255], rounded"
    return f"{dtype} pixels in [{low}, {high}]"
