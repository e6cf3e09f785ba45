"""Images in memory: a pair of arrays, a map-style data set of pairs, or a dictionary of such for each split."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data.npz import check_count, class_numbers, labels_of
from kr_fast.data.options import ReadOptions
from kr_fast.data.packed import Packed
from kr_fast.data.printable import listed, printable
from kr_fast.data.readers import columns
from kr_fast.data.readers.decoding import decoded, from_arrays
from kr_fast.data.splits import Part, SourceContent, split_name
from kr_fast.runtime import progress
from kr_fast.runtime.array_files import native
from kr_fast.runtime.errors import fail
from kr_fast.runtime.reprs import short

RULE = (
    "be digits, a path, a pair (images, labels), a map-style data set of pairs, or {'train': ..., 'test': ...} of these"
)
CHECKED = 32  # images that are read twice: half of them mirrored by chance are equal once in 4e9


def read(source: Any, options: ReadOptions, sizes: tuple[int, int] | None) -> tuple[str, SourceContent]:
    """(name, content) of images in memory.

    Raises: UserError naming the split, its rule and what it holds.
    """
    options.refuse(("table", "split_column", "group_column"), "images in memory")
    splits = {"all": source}
    if isinstance(source, Mapping):
        known = {name: split_name(str(name)) for name in source}
        if None in known.values() or len(set(known.values())) < len(known) or "train" not in known.values():
            fail("data", "source", "name its splits train, val and test, each once, and have train", list(source))
        splits = {which: source[name] for which in ("train", "val", "test") for name in known if known[name] == which}
    notes: list[str] = []
    parts = {which: _part(which, each, notes, options) for which, each in splits.items()}
    if len({isinstance(part.images, list) for part in parts.values()}) > 1:
        fail("data", "source", "hold arrays or images of Pillow in all splits", "both")
    named = {which: f"{which} labels" if which != "all" else "labels" for which in parts}
    for which, part in parts.items():
        check_count(part.labels, len(part.images), named[which])
    class_names, labels = class_numbers({which: part.labels for which, part in parts.items()}, named)
    names = next((names for each in splits.values() if (names := _class_names(each))), ())
    if len(names) >= len(class_names) and class_names == tuple(map(str, range(len(class_names)))):
        class_names = names
    groups = {which: part.groups for which, part in parts.items() if part.groups is not None}
    if groups and len(groups) < len(parts):
        fail("data", "groups", "be given for every split, or for none", f"those of {listed('', list(groups))}")
    if groups and "all" not in groups:
        columns.check_apart(groups, "groups")
    images = {which: part.images for which, part in parts.items()}
    if isinstance(next(iter(images.values())), list):
        result, done, warnings = decoded(images, labels, groups or None, sizes, options)
    else:
        result, done, warnings = from_arrays(images, labels, groups or None, "images")
    first = next(iter(splits.values()))
    name = "arrays" if isinstance(first, tuple | list) else type(first).__name__
    return name, SourceContent(result, class_names, [*done, *dict.fromkeys(notes)], warnings)


def _part(which: str, source: Any, notes: list[str], options: ReadOptions) -> Part:
    """Images as an array or a list of encoded ones, labels as :func:`kr_fast.data.npz.labels_of` returns them."""
    if isinstance(source, Part):
        groups = None if source.groups is None else np.asarray(source.groups, np.int64)
        return Part(np.asarray(source.images), labels_of(np.asarray(source.labels), "labels", notes), groups)
    if isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], np.ndarray | Tensor):
        return Part(_array(source[0]), labels_of(_array(source[1]), "labels", notes))
    name = "source" if which == "all" else which
    if isinstance(source, str | bytes | Mapping) or not hasattr(source, "__getitem__"):
        dataset = getattr(source, "dataset", None)
        remedy = " (of a DataLoader give its .dataset)" if hasattr(dataset, "__getitem__") else ""
        fail("data", name, RULE, f"{printable(short(source))}{remedy}")
    if not hasattr(source, "__len__"):
        fail("data", name, "have a length (list(data) reads one that is iterated over)", type(source).__name__)
    return _of_items(name, source, notes, options)


def _of_items(name: str, source: Any, notes: list[str], options: ReadOptions) -> Part:
    images, labels = [], []
    many = len(source) > 2000
    with progress.bar(len(source), "reading" if many else None, "image") as bar:
        for index in range(len(source)):
            image, label = _pair(name, source[index], index, options)
            images.append(image)
            labels.append(label)
            bar.update()
    if not images:
        fail("data", name, "hold at least one image", 0)
    for index in range(min(CHECKED, len(images))):
        again = _pair(name, source[index], index, options)[0]
        if not np.array_equal(np.asarray(again), np.asarray(images[index])):
            rule = "return the same image each time (leave random augmentation out, a run has its own)"
            fail("data", name, rule, f"two of index {index} that differ")
    shapes = {np.shape(label) for label in labels}
    if len(shapes) > 1:
        fail("data", f"{name} labels", "have one shape", sorted(shapes))
    return Part(_together(name, images), labels_of(np.asarray(labels), f"{name} labels", notes))


def _pair(name: str, item: Any, index: int, options: ReadOptions) -> tuple[Any, Any]:
    """(image as an array or an image of Pillow, label as a number, text or array)."""
    if isinstance(item, Mapping):
        named = ("image_column", "label_column")
        item = tuple(item[columns.column(list(item), of, getattr(options, of), "the items")] for of in named)
    else:
        options.refuse(("image_column", "label_column"), "pairs (image, label)")
    if not isinstance(item, tuple | list) or len(item) != 2:
        fail("data", name, "return pairs (image, label)", f"{printable(short(item))} of index {index}")
    image, label = item
    if not _is_pillow(image):
        image = _array(image)
        if image.dtype.kind not in "biuf":
            fail("data", name, "return images of Pillow or arrays", f"{printable(short(item[0]))} of index {index}")
    return image, label if isinstance(label, str) else _array(label)


def _together(name: str, images: list[Any]) -> np.ndarray | list[Packed]:
    """``[N, ...]`` of arrays of one shape; of images of Pillow the encoded ones, which are read as files are."""
    pillow = [_is_pillow(image) for image in images]
    if all(pillow):
        return [Packed(f"{name}, index {index}", _encoded(name, image)) for index, image in enumerate(images)]
    first = images[pillow.index(False)]
    for image in images:
        if _is_pillow(image) or image.shape != first.shape or image.dtype != first.dtype:
            kinds = [type(each).__name__ if _is_pillow(each) else short(each) for each in (first, image)]
            fail("data", f"{name} images", "have one shape and dtype", " and ".join(kinds))
    return np.stack(images)


def _encoded(name: str, image: Any) -> Any:
    """Returns the bytes of ``image`` as a TIFF, which has most modes, or as a PNG, which has transparent colours."""
    file, clear = io.BytesIO(), image.info.get("transparency") is not None
    try:
        image.save(file, "PNG" if clear else "TIFF", **({"exif": b""} if clear else {}))
    except (OSError, KeyError):
        fail("data", f"{name} images", "have a mode that files have, such as L or RGB", image.mode)
    return file.getvalue


def _is_pillow(image: Any) -> bool:
    return hasattr(image, "getexif") and hasattr(image, "convert")


def _array(value: Any) -> np.ndarray:
    """In native byte order; of a tensor of any device and dtype."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return native(np.asarray(value))


def _class_names(source: Any) -> tuple[str, ...]:
    """``classes`` of a data set of torchvision, or the names of the one feature of ``datasets`` that has names."""
    names = getattr(source, "classes", None)
    if isinstance(features := getattr(source, "features", None), Mapping):
        named = [each.names for each in features.values() if hasattr(each, "names")]
        names = named[0] if len(named) == 1 else None
    fits = isinstance(names, list | tuple) and all(isinstance(each, str) and each.isprintable() for each in names)
    return tuple(names) if fits else ()
