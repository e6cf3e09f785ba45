"""Many image files: their headers, checked over all files before one is decoded; then their pixels."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from kr_fast.data.options import ReadOptions
from kr_fast.data.packed import ImageFile, Packed
from kr_fast.data.pixel_range import Scale, percentiles, range_of
from kr_fast.data.pixels.decoding import (
    DEEP,
    MOST_PIXELS,
    NOTES,
    Form,
    Header,
    UnreadableError,
    decode,
    decode_deep,
    fitted,
    read_header,
)
from kr_fast.data.pixels.resizing import check_squares, in_threads
from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.splits import check_size
from kr_fast.runtime import progress
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.memory import free_memory

MANY = 2000  # files from which a bar is shown
LEAST, MOST = -(1 << 15), 1 << 16  # levels that are counted for a window
Failure = tuple[ImageFile, UnreadableError]


@dataclasses.dataclass
class FileImages:
    """The images of some files.

    ``pixels``: split -> uint8 ``[N, H, W, C]``; ``kept``: split -> which of the files they are, a mask; ``notes`` and
    ``warnings`` in numbers, without names.
    """

    pixels: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    notes: list[str]
    warnings: list[str]


def read(
    parts: dict[str, list[ImageFile]], sizes: tuple[int, int] | None, options: ReadOptions | None = None
) -> FileImages:
    """The images of the files of each split, as uint8 by one rule for all.

    Args:
        sizes: least and greatest height and width; None for any.
        options: ``image_size``, ``resize`` and ``skip_unreadable``.
    Raises: UserError for files that cannot be read, are of several sizes or kinds, or do not fit sizes or the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow on odd metadata, and on sizes that are refused here
        survey = Survey(parts, sizes, options or ReadOptions())
        need, free = survey.total * int(np.prod(survey.shape)), free_memory()
        if need > free:
            what = f"{counted(survey.total, 'image')} of {survey.shape[0]} x {survey.shape[1]} {survey.kind}"
            got = f"{what}, {need >> 20} MiB where {free >> 20} MiB are free"
            fail("data", "all images together", "fit the memory", got)
        pixels = {}
        with survey.bar("images") as bar:
            for which, files in survey.files.items():
                images = np.empty((len(files), *survey.shape), np.uint8)
                done = survey.fill(which, 0, images, bar.update)
                pixels[which] = images if done.all() else images[done]
        survey.refuse_unreadable()
        return FileImages(pixels, survey.kept, *survey.report())


class Survey:
    """Files whose headers were read and fit together: what all their images become, and the decoding of any of them.

    ``files``: split -> (file, header) of those that are read; ``kept``: split -> mask over the files that were given;
    ``shape``: of the images as they are returned.
    """

    def __init__(self, parts: dict[str, list[ImageFile]], sizes: tuple[int, int] | None, options: ReadOptions):
        self._options, self._notes = options, Counter()
        self._failed: list[Failure] = []
        self._counts, self._ranges = np.zeros(3, np.int64), {}  # of pixels: clipped, changed, all
        self.kept = {which: np.ones(len(part), bool) for which, part in parts.items()}
        self.total = sum(map(len, parts.values()))
        self.files = {}
        limit, known = MOST_PIXELS if options.image_size else 0, {}
        with self.bar("headers") as bar:
            for which, part in parts.items():
                self.files[which] = [(file, None) for file in part]
                headers = self._results(which, range(len(part)), lambda each: read_header(each[0], limit), bar.update)
                self.files[which] = [(part[row], known.setdefault(header, header)) for row, header in headers]
        self.refuse_unreadable()
        given, self.total = self.total, sum(map(len, self.files.values()))
        if not self.total:
            fail("data", "source", "hold an image that can be read", f"none of {given}")
        every = [each for files in self.files.values() for each in files]
        self.kind = _common_kind(every)
        ends = [pick((header for _, header in every), key=lambda header: header.area) for pick in (min, max)]
        self._smallest, self._largest = (f"{header.height} x {header.width}" for header in ends)
        height, width = _common_size(every, options)
        check_size(height, width, sizes)
        self._form = Form(3 if "colour" in self.kind else 1, options.image_size, options.resize)
        self.shape = height, width, self._form.channels
        self._scale = self._scale_of_deep() if self.kind in DEEP else None

    def bar(self, description: str) -> progress.bar:
        """A progress bar over all files, if they are many."""
        return progress.bar(self.total, description if self.total >= MANY else None, "image")

    def fill(self, which: str, start: int, rows: np.ndarray, update: Callable[[], None]) -> np.ndarray:
        """Decode the files of a split from ``start`` on into ``rows``, as many as it has; returns which could be."""
        done = np.zeros(len(rows), bool)

        def one(each: tuple[ImageFile, Header]) -> tuple[np.ndarray, list[str], tuple[int, int, int]]:
            return self._decoded(*each)

        for row, (pixels, notes, counts) in self._results(which, range(start, start + len(rows)), one, update):
            done[row - start], rows[row - start] = True, pixels
            self._notes.update(notes)
            self._counts += counts
            self._saw(which, pixels)
        return done

    def _decoded(self, file: ImageFile, header: Header) -> tuple[np.ndarray, list[str], tuple[int, int, int]]:
        """(uint8 ``[H, W, C]``, keys of ``NOTES``, pixels that were clipped, those that changed by it, all)."""
        if self._scale is None:
            pixels, notes = decode(file, header, self._form)
            return pixels, notes, (0, 0, pixels.size)
        deep, notes = decode_deep(file, header)
        pixels, clipped, changed = self._scale.convert(deep)
        return fitted(Image.fromarray(pixels[..., 0]), self._form, notes), notes, (clipped, changed, deep.size)

    def report(self) -> tuple[list[str], list[str]]:
        """(notes, warnings) on what was decoded. Raises: UserError where the range of its pixels is not certain."""
        notes = self._notes
        if self.kind == "16-bit colour" and not notes["bright"]:
            remedy = "scale their samples so that white is 65535"
            fail("data", "images of 16-bit colour", "use their 16 bits", f"none with a sample above 32767 ({remedy})")
        scale = self._scale or Scale(list(self._ranges.values()))
        done, warned = scale.report(*map(int, self._counts))
        done += [text.format(counted(notes[key], "image")) for key, text in NOTES.items() if notes[key]]
        if notes["resized"]:
            ends = f"{self._smallest} to {self._largest}" if self._smallest != self._largest else self._smallest
            how = f" by {self._options.resize}" if self._options.resize else ""
            text = f"{counted(notes['resized'], 'image')} of {ends} brought to one size{how}"
            done.append(text + (f", {notes['enlarged']} of them enlarged" if notes["enlarged"] else ""))
        left_out = sum(int((~mask).sum()) for mask in self.kept.values())
        if left_out:
            done.append(f"left out as unreadable: {counted(left_out, 'image')}")
        return done, warned

    def refuse_unreadable(self) -> None:
        """Name the files that could not be read. Raises: UserError, unless they are to be skipped."""
        failed, self._failed = self._failed, []
        if not failed:
            return
        if self._options.skip_unreadable:
            for file, error in failed:
                logger.warning("data: %s is left out: %s", printable(file), error)
            return
        got = listed("", [f"{file} ({error})" for file, error in failed])
        if len(failed) == 1:
            raise UserError(f"data: image must be readable, got {got}") from failed[0][1]
        remedy = "skip_unreadable leaves them out"
        raise UserError(f"data: every image must be readable, got {len(failed)} that are not: {got} ({remedy})")

    def _results(
        self, which: str, rows: range, function: Callable[[Any], Any], update: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """(row, result) of ``rows`` of the files of a split, those that could be read."""
        files, given = self.files[which], np.flatnonzero(self.kept[which])

        def attempt(row: int) -> Any:
            try:
                return function(files[row])
            except UnreadableError as error:
                return error

        for row, result in zip(rows, in_threads(attempt, rows), strict=True):
            update()
            if isinstance(result, UnreadableError):
                self._failed.append((files[row][0], result))
                self.kept[which][given[row]] = False
            else:
                yield row, result

    def _saw(self, which: str, pixels: np.ndarray) -> None:
        now = range_of(which, pixels)
        self._ranges[which] = self._ranges[which].joined(now) if which in self._ranges else now

    def _scale_of_deep(self) -> Scale:
        """The rule for 16 bits and floats, for which all files are decoded once more."""
        levels = np.zeros(MOST - LEAST, np.int64) if self.kind == "16-bit grey" else None
        with self.bar("range of pixels") as bar:
            for which, files in self.files.items():
                rows = []
                for row, (pixels, _) in self._results(
                    which, range(len(files)), lambda each: decode_deep(*each), bar.update
                ):
                    rows.append(row)
                    self._saw(which, pixels)
                    if levels is not None:
                        inside = pixels[(pixels >= LEAST) & (pixels < MOST)]
                        levels += np.bincount(inside - LEAST, minlength=len(levels))
                self.files[which] = [files[row] for row in rows]
        self.refuse_unreadable()
        ranges, self._ranges = list(self._ranges.values()), {}
        return Scale(ranges, None if levels is None else lambda: tuple(LEAST + at for at in percentiles(levels)))


def _common_kind(every: list[tuple[ImageFile, Header]]) -> str:
    """The kind that all images become: 8 bits of grey and of colour go together."""
    kinds = Counter(header.kind for _, header in every)
    flat = kinds.keys() - {*DEEP}
    if len(kinds) > 1 and flat != kinds.keys():
        remedy = "bring them to one depth first: of 16 bits and floats all must be"
        fail("data", "every image", "have one depth", f"{_counts(every, lambda header: header.kind)}; {remedy}")
    return next((kind for kind in ("16-bit colour", "colour") if kind in kinds), next(iter(kinds)))


def _common_size(every: list[tuple[ImageFile, Header]], options: ReadOptions) -> tuple[int, int]:
    """(height, width) of all images as they are returned."""
    sizes = Counter((header.height, header.width) for _, header in every)
    (usual, _), *others = sizes.most_common()
    if options.image_size:
        odd = [(size, count) for size, count in sizes.items() if size[0] != size[1]]
        first = f"{odd[0][0][0]} x {odd[0][0][1]}" if odd else ""
        check_squares(options.resize, sum(count for _, count in odd), len(every), first)
        return options.image_size, options.image_size
    if others:
        remedy = "image_size brings them to one size: --image-size 64 --resize crop, pad or stretch"
        fail("data", "every image", "have one size and one mode", f"{_counts(every, str)}; {remedy}")
    return usual


def _counts(every: list[tuple[ImageFile, Header]], name: Callable[[Header], str]) -> str:
    """How many have the commonest ``name``; how many, and which, have another."""
    (usual, count), *others = Counter(name(header) for _, header in every).most_common()
    parts = [f"{count} of {usual}"]
    for other, count in others[:3]:
        names = [_short(file) for file, header in every if name(header) == other]
        parts.append(f"{count} of {other} ({listed('', names)})")
    if len(others) > 3:
        parts.append(f"{len(others) - 3} more")
    return ", ".join(parts)


def _short(file: ImageFile) -> str:
    return printable(file if isinstance(file, Packed) else f"{file.parent.name}/{file.name}")
