"""One rule for the range and the depth of pixels, decided once over all splits together.

A set has one value of white: 1, 255 or 65535. It is taken only where nothing else can be meant; the rule stands in
docs/reference/data.md. What is ambiguous (12-bit values, [-1, 1], standardised pixels) is refused with the remedy.
"""

import dataclasses
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from kr_fast.runtime.errors import fail

OVERSHOOT = 0.1  # of white: how far resampling may go beyond black and white
CENTRED = 0.25  # share of pixels that clipping may change; more are not overshoot
DARK = 1 / 16  # of white: a split or a set whose largest pixel is below it is on another scale
CONTRAST = 32  # of 255: pixels that span less are a warning
BLOCK = 1 << 22  # pixels converted at a time
WINDOW = (0.5, 99.5)  # percentiles: those of Isensee et al., nnU-Net, Nature Methods 18, 2021, for CT
OVER_ALL = "percentiles over all images"  # in the note on a window, which private training cannot cover
SCALE = "scale them to 8 bit, np.round(x * (255 / white)).astype(np.uint8) with white = 4095 for 12 bit"


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of one split; ``low`` and ``high`` are exact."""

    name: str
    dtype: np.dtype
    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]" if self.dtype.kind == "f" else f"[{self.low}, {self.high}]"

    def joined(self, other: "Range") -> "Range":
        """The range of both."""
        return dataclasses.replace(self, low=min(self.low, other.low), high=max(self.high, other.high))


class Scale:
    """The one rule by which pixels of all splits become uint8, decided by their ranges.

    ``round((x - black) * 255 / (white - black))``, half to even, in float64, clipped to [0, 255].

    Args:
        ranges: of the splits, those without a pixel left out.
        window: black and white where they do not follow from the ranges: of integers of 9 to 15 bits. None refuses.
    Raises: UserError where the range is not certain, or splits differ in scale.
    """

    def __init__(self, ranges: list[Range], window: Callable[[], tuple[int, int]] | None = None):
        self._ranges = ranges
        self._low = min(ranges, key=lambda each: each.low)
        self._high = max(ranges, key=lambda each: each.high)
        self.black, self.windowed = 0, False
        if window is not None and self._is_of_uncertain_depth():
            self.black, self.white = window()
            self.windowed = self.black < self.white
        if not self.windowed:
            self.black, self.white = 0, _white(ranges, self._low, self._high)
        _one_scale(ranges, self._high, self.white)

    def _is_of_uncertain_depth(self) -> bool:
        low, high = self._low.low, self._high.high
        if any(each.dtype.kind == "f" for each in self._ranges):
            return False
        return 255 < high < 1 << 15 if low >= 0 else low >= -(1 << 15) and high < 1 << 16

    def convert(self, images: np.ndarray) -> tuple[np.ndarray, int, int]:
        """(uint8 images, pixels beyond black and white, those of them that are beyond by more than half a level)."""
        if self.white == 255 and not self.windowed and images.dtype == np.uint8:
            return np.ascontiguousarray(images), 0, 0
        pixels = np.empty(images.shape, np.uint8)
        rows = max(1, BLOCK // max(1, images[:1].size))
        clipped = changed = 0
        for start in range(0, len(images), rows):
            levels = self._levels(images[start : start + rows].astype(np.float64))
            clipped += int(((levels < 0) | (levels > 255)).sum())
            changed += int(((levels < -0.5) | (levels > 255.5)).sum())
            pixels[start : start + rows] = np.clip(np.rint(levels), 0, 255)
        return pixels, clipped, changed

    def _levels(self, images: np.ndarray) -> np.ndarray:
        if self.windowed:
            return (images - self.black) * 255 / (self.white - self.black)
        return images / 257 if self.white == 65535 else images * (255 // self.white)

    def report(self, clipped: int, changed: int, total: int) -> tuple[list[str], list[str]]:
        """(notes on what was done, warnings), of the counts of :meth:`convert` over ``total`` pixels.

        Raises: UserError where so many pixels were clipped that they are no overshoot.
        """
        low, high, white = self._low, self._high, self.white
        dtype = "/".join(sorted({str(each.dtype) for each in self._ranges}))
        if self.windowed:
            ends = " and ".join(f"{share:g}" for share in WINDOW)
            window = f"[{self.black}, {white}], their {ends} {OVER_ALL}"
            return [f"{dtype} pixels in [{low.low}, {high.high}], windowed to {window}"], []
        if changed > CENTRED * total:
            remedy = "shift and scale them so that 0 is black and 1 or 255 white"
            fail("data", low.name, f"lie in [0, {white}]", f"{changed} of {total} pixels beyond it ({remedy})")
        note = _words(self._ranges, low.low, high.high, white)
        if clipped:
            ends = f"the lowest {low.low:g}, the highest {high.high:g}" if changed else "by rounding only"
            note += f", {clipped} of {total} pixels beyond [0, {white}] clipped ({ends})"
        span = (min(high.high, white) - max(low.low, 0)) * 255 / white
        if not 0 < span < CONTRAST:
            return [note], []
        ends = f"[{max(low.low, 0):g}, {high.high:g}] of [0, {white}]"
        bright = high.high > white / 2
        meant = "their contrast is low" if bright else f"if {high.high:g} is white, divide by it first"
        return [note], [f"pixels span only {ends}: {meant}"]


def to_uint8(parts: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """uint8 pixels of all splits by one rule, that of :class:`Scale`.

    Args:
        parts: name of the argument -> images of any shape; bool, integers or floats.
    Returns: (the images, notes on what was done, warnings).
    Raises: UserError where the range is not certain, pixels are not finite, or splits differ in scale.
    """
    ranges = [range_of(name, images) for name, images in parts.items() if images.size]
    if not ranges:
        return {name: images.astype(np.uint8) for name, images in parts.items()}, [], []
    scale = Scale(ranges)
    pixels, clipped, changed = {}, 0, 0
    for name, images in parts.items():
        pixels[name], outside, moved = scale.convert(images)
        clipped, changed = clipped + outside, changed + moved
    return pixels, *scale.report(clipped, changed, sum(images.size for images in parts.values()))


def range_of(name: str, images: np.ndarray) -> Range:
    """The range of ``images``, at least one pixel. Raises: UserError if they are no numbers, or not finite."""
    if images.dtype.kind not in "biuf":
        fail("data", name, "be integers in [0, 255], or floats in [0, 1] or [0, 255]", images.dtype)
    low, high = images.min().item(), images.max().item()
    if images.dtype.kind == "f" and not np.isfinite((low, high)).all():
        fail("data", name, "hold finite pixels", f"{int((~np.isfinite(images)).sum())} that are not")
    return Range(name, images.dtype, *((int(low), int(high)) if images.dtype.kind == "b" else (low, high)))


def percentiles(counts: np.ndarray) -> tuple[int, int]:
    """The indices of ``counts``, how often each level occurs, at the percentiles ``WINDOW``: the least levels that at
    least this share of all pixels does not exceed."""
    below = np.cumsum(counts)
    return tuple(int(np.searchsorted(below, share / 100 * below[-1])) for share in WINDOW)


def _white(ranges: list[Range], low: Range, high: Range) -> int:
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


def _white_of_integers(ranges: list[Range], low: Range, high: Range) -> int:
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


def _refuse(bad: Range, remedy: str) -> NoReturn:
    kinds = "integers in [0, 255] or of full 16 bits" if bad.dtype.kind != "f" else "floats in [0, 1] or [0, 255]"
    fail("data", bad.name, f"be {kinds}", f"{bad.dtype} in {bad} ({remedy})")


def _one_scale(ranges: list[Range], high: Range, white: int) -> None:
    """Refuse a split that would come out black beside the others: it is on another scale."""
    certain = all(each.dtype == np.uint8 for each in ranges)
    for each in ranges:
        if 0 < each.high < (2 if certain else white * DARK):
            rule = f"be on the scale of {high.name}, which lie in {high}"
            fail("data", each.name, rule, f"{each.dtype} in {each} (bring all splits to one scale)")


def _words(ranges: list[Range], low: float, high: float, white: int) -> str:
    dtype = "/".join(sorted({str(each.dtype) for each in ranges}))
    if white == 65535:
        return f"{dtype} pixels, the largest {high}, divided by 257"
    if white == 1:
        return f"{dtype} pixels{'' if dtype == 'bool' else ' in [0, 1]'}, times 255"
    if any(each.dtype.kind == "f" for each in ranges):
        return f"{dtype} pixels in [0, 255], rounded"
    return f"{dtype} pixels in [{low}, {high}]"
