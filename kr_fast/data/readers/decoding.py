"""Image files with their labels and groups -> the parts of a source: the one place where readers decode files."""

import numpy as np

from kr_fast.data.npz import with_channel
from kr_fast.data.options import ReadOptions
from kr_fast.data.packed import ImageFile
from kr_fast.data.pixel_range import to_uint8
from kr_fast.data.printable import counted
from kr_fast.data.splits import Part, SourceContent


def decoded(
    files: dict[str, list[ImageFile]],
    labels: dict[str, np.ndarray],
    groups: dict[str, np.ndarray] | None,
    sizes: tuple[int, int] | None,
    options: ReadOptions,
) -> tuple[dict[str, Part], list[str], list[str]]:
    """(split -> its part, notes on what was done with pixels, warnings).

    Args:
        files, labels, groups: of each split, or of ``all``, in one order.
        sizes: least and greatest height and width; None for any.
        options: how images are brought to one size, and whether unreadable ones are skipped.
    Raises: UserError for files that cannot be read or do not fit together.
    """
    from kr_fast.data import image_files  # loads Pillow

    named = {which: f"{which} images" if which != "all" else "images" for which in files}
    images = image_files.read({named[which]: files[which] for which in files}, sizes, options)
    parts = {}
    for which, name in named.items():
        kept = images.kept[name]
        parts[which] = Part(images.pixels[name], labels[which][kept], None if groups is None else groups[which][kept])
    return parts, images.notes, images.warnings


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
    from kr_fast.data.pixels.resizing import resize_images  # loads Pillow

    for which, part in content.parts.items():
        images = resize_images(part.images, options.image_size, options.resize)
        if images is not part.images:
            size = f"{part.images.shape[1]} x {part.images.shape[2]}"
            content.notes.append(f"{counted(len(images), 'image')} of {size} brought to one size")
            content.parts[which] = part._replace(images=images)
