"""Image files with their labels and groups -> the parts of a source: the one place where readers decode files."""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from kr_fast.data.npz import with_channel
from kr_fast.data.options import ReadOptions
from kr_fast.data.packed import ImageFile
from kr_fast.data.pixel_range import to_uint8
from kr_fast.data.splits import Part, SourceContent

LARGE = 1 << 29  # bytes of pixels above which files are decoded when the set has been cut, and to disk where possible


def decoded(
    files: dict[str, list[ImageFile]],
    labels: dict[str, np.ndarray],
    groups: dict[str, np.ndarray] | None,
    sizes: tuple[int, int] | None,
    options: ReadOptions,
) -> tuple[dict[str, Part], list[str], list[str]]:
    """(split -> its part, notes on what was done with pixels, warnings).

    The images of a set above ``LARGE`` are not decoded yet: they are rows of files, which :func:`settled` decodes.

    Args:
        files, labels, groups: of each split, or of ``all``, in one order.
        sizes: least and greatest height and width; None for any.
        options: how images are brought to one size, and whether unreadable ones are skipped.
    Raises: UserError for files that cannot be read or do not fit together.
    """
    from kr_fast.data.image_files import FileRows, Survey  # loads Pillow

    named = {which: f"{which} images" if which != "all" else "images" for which in files}
    survey = Survey({named[which]: files[which] for which in files}, sizes, options)
    parts = {}
    for which, name in named.items():
        kept = survey.kept[name]
        of_groups = None if groups is None else groups[which][kept]
        parts[which] = Part(FileRows(survey, name), labels[which][kept], of_groups)
    if sum(part.images.nbytes for part in parts.values()) > LARGE:
        return parts, [], []
    return settled(parts, None)


def settled(parts: dict[str, Part], folder: Path | None) -> tuple[dict[str, Part], list[str], list[str]]:
    """``parts`` with arrays in place of images of files that are not decoded yet; and the notes and warnings on them.

    Args:
        folder: where images are decoded to and mapped from; None for memory.
    Raises: UserError for files that cannot be read, do not fit together, or do not fit the memory or the disk.
    """
    if all(isinstance(part.images, np.ndarray) for part in parts.values()):
        return parts, [], []
    rows = {which: part.images for which, part in parts.items()}
    if folder is None:
        from kr_fast.data.image_files import in_memory

        images = in_memory(rows)
    else:
        from kr_fast.data.memory_map import convert

        images = convert(folder, rows)
    done = {}
    for which, part in parts.items():
        kept = images.kept[which]
        done[which] = Part(images.pixels[which], *(None if each is None else each[kept] for each in part[1:]))
    return done, images.notes, images.warnings


def from_arrays(
    arrays: dict[str, np.ndarray], labels: dict[str, np.ndarray], groups: dict[str, np.ndarray] | None, what: str
) -> tuple[dict[str, Part], list[str], list[str]]:
    """As :func:`decoded`, of images that are arrays ``[N, ...]``; ``what`` names them in errors."""
    notes: list[str] = []
    named = {which: f"{which} images" if which != "all" else "images" for which in arrays}
    shaped = {named[which]: with_channel(each, what, len(labels[which]), notes) for which, each in arrays.items()}
    pixels, done, warnings = to_uint8(shaped)
    parts = {
        which: Part(pixels[name], labels[which], None if groups is None else groups[which])
        for which, name in named.items()
    }
    return parts, [*done, *dict.fromkeys(notes)], warnings


def in_one_size(content: SourceContent, options: ReadOptions) -> None:
    """Bring images that did not come from files to the size of ``options``, as those of files are."""
    if not options.image_size:
        return
    from kr_fast.data.pixels.resizing import note_of_sizes, resize_images  # loads Pillow

    sizes: Counter[tuple[int, int]] = Counter()
    for which, part in content.parts.items():
        images = resize_images(part.images, options.image_size, options.resize)
        if images is not part.images:
            sizes[part.images.shape[1:3]] += len(images)
            content.parts[which] = part._replace(images=images)
    if sizes:
        ends = [pick(sizes, key=math.prod) for pick in (min, max)]
        enlarged = sum(count for size, count in sizes.items() if max(size) < options.image_size)
        content.notes.append(note_of_sizes(sizes.total(), *ends, options.resize, enlarged))
