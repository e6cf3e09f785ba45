"""Many image files: their headers, checked over all files before one is decoded; then their pixels."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from kr_fast.data.options import ReadOptions
from kr_fast.data.packed import ImageFile, Packed
from kr_fast.data.pixel_range import Range, Scale, percentiles, range_of
from kr_fast.data.pixels.decoding import (
    DEEP,
    MOST_PIXELS,
    NOTES,
    Form,
    Header,
    UnreadableError,
    decode,
    decode_deep,
    fit,
    read_header,
)
from kr_fast.data.pixels.resizing import check_squares, in_threads, note_of_sizes
from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.splits import check_size
from kr_fast.runtime import progress
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.memory import free_memory
from kr_fast.runtime.storage.image_rows import MappedFile

MANY = 2000  # files from which a bar is shown
LEAST, MOST = -(1 << 15), 1 << 16  # levels that are counted for a window
Failure = tuple[ImageFile, UnreadableError]


@dataclasses.dataclass
class FileImages:
    """The images of some files.

    ``pixels``: split -> uint8 ``[N, H, W, C]``, in memory or mapped; ``kept``: split -> which of the files they are, a
    mask; ``notes`` and ``warnings`` in numbers, without names.
    """

    pixels: dict[str, np.ndarray | MappedFile]
    kept: dict[str, np.ndarray]
    notes: list[str]
    warnings: list[str]


@dataclasses.dataclass
class Tally:
    """What decoding some files showed: counts of ``NOTES``, the range of their pixels, files that were left out."""

    notes: Counter = dataclasses.field(default_factory=Counter)
    counts: tuple[int, int, int] = (0, 0, 0)  # of pixels: clipped, changed by more than half a level, all
    ends: tuple[int, int] = (255, 0)  # the least and the largest pixel
    left_out: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        counts = tuple(first + second for first, second in zip(self.counts, other.counts, strict=True))
        ends = min(self.ends[0], other.ends[0]), max(self.ends[1], other.ends[1])
        return Tally(self.notes + other.notes, counts, ends, self.left_out + other.left_out)


def read(
    parts: dict[str, list[ImageFile]], sizes: tuple[int, int] | None, options: ReadOptions | None = None
) -> FileImages:
    """The images of the files of each split, as uint8 by one rule for all, in memory.

    Args:
        sizes: least and greatest height and width; None for any.
        options: ``image_size``, ``resize`` and ``skip_unreadable``.
    Raises: UserError for files that cannot be read, are of several sizes or kinds, or do not fit sizes or the memory.
    """
    survey = Survey(parts, sizes, options or ReadOptions())
    images = in_memory({name: FileRows(survey, name) for name in parts})
    for name, kept in survey.kept.items():
        kept[kept] = images.kept[name]
    return dataclasses.replace(images, kept=survey.kept)


@dataclasses.dataclass(frozen=True, eq=False)
class FileRows:
    """Images that are not decoded yet: ``rows`` of the files ``name`` of a survey, in this order; None for all."""

    survey: "Survey"
    name: str
    rows: np.ndarray | None = None

    def __post_init__(self):
        if self.rows is None:
            object.__setattr__(self, "rows", np.arange(len(self.survey.files[self.name])))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the array that they become, if all can be read."""
        return len(self.rows), *self.survey.shape

    @property
    def nbytes(self) -> int:
        """Of that array."""
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: np.ndarray) -> "FileRows":
        return FileRows(self.survey, self.name, self.rows[which])


def in_memory(parts: dict[str, FileRows]) -> FileImages:
    """The images of ``parts``, all of one survey; ``kept`` is over their rows. Raises: as :func:`read`."""
    survey = next(iter(parts.values())).survey
    need, free = sum(part.nbytes for part in parts.values()), free_memory()
    if need > free:
        got = f"{survey.words}, {need >> 20} MiB where {free >> 20} MiB are free"
        fail("data", "all images together", "fit the memory", got)
    pixels, kept, tallies = {}, {}, {}
    with survey.bar("images") as bar:
        for which, part in parts.items():
            images = np.empty(part.shape, np.uint8)
            kept[which], tally = survey.fill(part.name, part.rows, images, bar.update)
            pixels[which] = images if kept[which].all() else images[kept[which]]
            tallies[part.name] = tallies.get(part.name, Tally()) + tally
    survey.refuse_unreadable()
    return FileImages(pixels, kept, *survey.report(tallies))


class Survey:
    """Files whose headers were read and fit together: what all their images become, and the decoding of any of them.

    ``files``: split -> (file, header) of those that are read; ``kept``: split -> mask over the files that were given;
    ``shape``: of the images as they are returned.
    """

    def __init__(self, parts: dict[str, list[ImageFile]], sizes: tuple[int, int] | None, options: ReadOptions):
        self._options = options
        self._failed: list[Failure] = []
        self.total = sum(map(len, parts.values()))
        self.kept = {name: np.zeros(len(part), bool) for name, part in parts.items()}
        self.files: dict[str, list[tuple[ImageFile, Header]]] = {}
        limit, known = MOST_PIXELS if options.image_size else 0, {}
        with self.bar("headers") as bar:
            for name, part in parts.items():
                headers = self._results(part, lambda file: read_header(file, limit), bar.update)
                self._keep(name, [(row, (part[row], known.setdefault(header, header))) for row, header in headers])
        self.refuse_unreadable()
        if not any(self.files.values()):
            fail("data", "source", "hold an image that can be read", f"none of {self.total}")
        every = [each for files in self.files.values() for each in files]
        self.kind = _common_kind(every)
        ends = [pick((header for _, header in every), key=lambda header: header.area) for pick in (min, max)]
        self._smallest, self._largest = ((header.height, header.width) for header in ends)
        height, width = _common_size(every, options)
        check_size(height, width, sizes)
        self.form = Form(3 if "colour" in self.kind else 1, options.image_size, options.resize)
        self.shape = height, width, self.form.channels
        self.scale = self._scale_of_deep() if self.kind in DEEP else None

    @property
    def words(self) -> str:
        """How many images of which size and kind."""
        count = sum(map(len, self.files.values()))
        return f"{counted(count, 'image')} of {self.shape[0]} x {self.shape[1]} {self.kind}"

    def bar(self, description: str, done: int = 0) -> progress.bar:
        """A progress bar over all files, if they are many."""
        return progress.bar(self.total, description if self.total >= MANY else None, "image", done)

    def fill(
        self, name: str, rows: Sequence[int], out: np.ndarray, update: Callable[[], None]
    ) -> tuple[np.ndarray, Tally]:
        """Decode ``rows`` of the files ``name`` into ``out``; (which could be read, a mask, what was seen)."""
        files, done, notes, counts = self.files[name], np.zeros(len(rows), bool), Counter(), np.zeros(3, np.int64)
        items = [(*files[row], out[at]) for at, row in enumerate(rows)]
        for at, (seen, *counted_pixels) in self._results(items, self._decode, update):
            done[at] = True
            notes.update(seen)
            counts += counted_pixels
        read = out if done.all() else out[done]
        ends = (int(read.min()), int(read.max())) if read.size else Tally.ends
        return done, Tally(notes, tuple(counts.tolist()), ends, int((~done).sum()))

    def _decode(self, item: tuple[ImageFile, Header, np.ndarray]) -> tuple[list[str], int, int, int]:
        """Decode a file into the last of ``item``; (keys of ``NOTES``, and the counts of a :class:`Tally`)."""
        file, header, out = item
        if self.scale is None:
            return decode(file, header, self.form, out), 0, 0, header.area
        deep, notes = decode_deep(file, header)
        levels, clipped, changed = self.scale.convert(deep)
        fit(Image.fromarray(levels[..., 0]), self.form, out, notes)
        return notes, clipped, changed, header.area

    def report(self, tallies: dict[str, Tally]) -> tuple[list[str], list[str]]:
        """(notes, warnings) on what was decoded of the files of each name.

        Raises: UserError where the range of pixels is not certain.
        """
        tally = sum(tallies.values(), Tally())
        notes = tally.notes
        if self.kind == "16-bit colour" and not notes["bright"]:
            remedy = "scale their samples so that white is 65535"
            fail("data", "images of 16-bit colour", "use their 16 bits", f"none with a sample above 32767 ({remedy})")
        seen = {name: each for name, each in tallies.items() if each.counts[2]}
        if not seen:
            fail("data", "source", "hold an image that can be read", f"none of {self.total}")
        scale = self.scale or Scale([Range(name, np.dtype(np.uint8), *each.ends) for name, each in seen.items()])
        done, warned = scale.report(*tally.counts)
        done += [text.format(counted(notes[key], "image")) for key, text in NOTES.items() if notes[key]]
        if notes["resized"]:
            ends = self._smallest, self._largest
            done.append(note_of_sizes(notes["resized"], *ends, self._options.resize, notes["enlarged"]))
        if left_out := tally.left_out + sum(int((~mask).sum()) for mask in self.kept.values()):
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
            remedy = "--skip-unreadable leaves it out and counts it"
            raise UserError(f"data: image must be readable, got {got}; {remedy}") from failed[0][1]
        remedy = "--skip-unreadable leaves them out and counts them"
        raise UserError(f"data: every image must be readable, got {len(failed)} that are not: {got}; {remedy}")

    def _results(
        self, items: Sequence[Any], function: Callable[[Any], Any], update: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """(index, result) of ``items``, those that could be read; the others are in ``_failed``."""

        def attempt(item: Any) -> Any:
            try:
                return function(item)
            except UnreadableError as error:
                return error

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow on odd metadata, and on sizes that are refused here
            for index, result in enumerate(in_threads(attempt, items)):
                update()
                if isinstance(result, UnreadableError):
                    item = items[index]
                    self._failed.append((item[0] if isinstance(item, tuple) else item, result))
                else:
                    yield index, result

    def _keep(self, name: str, files: list[tuple[int, tuple[ImageFile, Header]]]) -> None:
        """Of the files of ``name``, keep those with these indices."""
        given = np.flatnonzero(self.kept[name]) if name in self.files else np.arange(len(self.kept[name]))
        self.kept[name][:] = False
        self.kept[name][given[[row for row, _ in files]]] = True
        self.files[name] = [each for _, each in files]

    def _scale_of_deep(self) -> Scale:
        """The rule for 16 bits and floats, for which all files are decoded once more."""
        levels = np.zeros(MOST - LEAST, np.int64) if self.kind == "16-bit grey" else None
        ranges: dict[str, Range] = {}
        with self.bar("range of pixels") as bar:
            for name, files in self.files.items():
                read = []
                for row, (pixels, _) in self._results(files, lambda each: decode_deep(*each), bar.update):
                    now = range_of(name, pixels)
                    ranges[name] = ranges[name].joined(now) if name in ranges else now
                    read.append((row, files[row]))
                    if levels is not None:
                        inside = pixels[(pixels >= LEAST) & (pixels < MOST)]
                        levels += np.bincount(inside - LEAST, minlength=len(levels))
                self._keep(name, read)
        self.refuse_unreadable()
        if not ranges:
            fail("data", "source", "hold an image that can be read", f"none of {self.total}")
        window = None if levels is None else lambda: tuple(LEAST + at for at in percentiles(levels))
        return Scale(list(ranges.values()), window)


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
