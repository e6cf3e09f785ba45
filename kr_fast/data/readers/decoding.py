"""Image files with their labels and groups -> the parts of a source: the one place where readers decode files."""

import numpy as np

from kr_fast.data.options import ReadOptions
from kr_fast.data.packed import ImageFile
from kr_fast.data.pixel_range import to_uint8
from kr_fast.data.splits import Part


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
        options: how images are brought to one size.
    Raises: UserError for files that cannot be read or do not fit together.
    """
    from kr_fast.data import image_files  # loads Pillow

    named = {which: f"{which} images" if which != "all" else "images" for which in files}
    images, done = image_files.read({named[which]: files[which] for which in files}, sizes)
    pixels, notes, warnings = to_uint8(images)
    parts = {
        which: Part(pixels[named[which]], labels[which], None if groups is None else groups[which]) for which in files
    }
    return parts, [*notes, *done], warnings
