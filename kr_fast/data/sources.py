"""Where images come from: scikit-learn's digits, files and folders of several kinds, or memory; and their cuts."""

import dataclasses
import functools
import hashlib
import numbers
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data import folders, npz
from kr_fast.data.duplicates import digests
from kr_fast.data.options import COLUMNS, ReadOptions
from kr_fast.data.printable import counted, printable
from kr_fast.data.readers import arrays, hugging_face, kinds, table, web_dataset
from kr_fast.data.readers.columns import check_apart
from kr_fast.data.readers.decoding import decoded, in_one_size, settled
from kr_fast.data.splits import (
    CLASSES,
    SIZES,
    TEST_FRACTION,
    VAL_FRACTION,
    Part,
    SourceContent,
    check_size,
    class_counts,
    cut,
)
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.reprs import ShortRepr
from kr_fast.runtime.storage.image_rows import ImageRows, Images, MappedFile, hash_images, rows_of

SPLITS = ("train", "val", "test")
KINDS = "be digits, a .npz, .parquet or .tar file, or a folder of images"


@dataclasses.dataclass(frozen=True, repr=False)
class Split(ShortRepr):
    """``images``: uint8 ``[N, H, W, C]``, a tensor, or ``ImageRows`` of a set that is not to be copied.

    ``labels``: int64 ``[N]``; ``groups``: int64 ``[N]``, the number of each image's group (a patient, a site), or None
    where none are known.
    """

    images: Images
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, which: Tensor | slice) -> "Split":
        """The rows that ``which`` selects, a mask, indices or a slice, with their labels and groups."""
        groups = None if self.groups is None else self.groups[which]
        return Split(rows_of(self.images, which), self.labels[which], groups)

    @functools.cached_property
    def digests(self) -> list[bytes]:
        """128-bit BLAKE2b of the bytes of each image."""
        return digests(self.images)


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset(ShortRepr):
    """A named set with three disjoint splits. Choices are made on ``val``; ``test`` is read once, at the end.

    ``notes``: how pixels were read, what was not read, and what is suspicious, in numbers and without any name of a
    file, so that a report can hold them.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return tuple(self.train.images.shape[1:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over images, labels and groups, where there are any, of all splits."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            digest.update(str(tuple(split.images.shape)).encode())
            hash_images(digest, split.images)
            digest.update(split.labels.numpy().data)
            if split.groups is not None:
                digest.update(split.groups.numpy().data)
        return digest.hexdigest()


def to_float(images: Images) -> Tensor:
    """``images`` uint8 ``[N, H, W, C]`` -> float32 ``[N, C, H, W]`` in [-1, 1], channels_last in memory."""
    return images[:].permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def load(
    source: Any,
    *,
    seed: int = 0,
    val_fraction: float = VAL_FRACTION,
    test_fraction: float = TEST_FRACTION,
    options: ReadOptions | None = None,
) -> Dataset:
    """Read ``source`` and cut what it does not split itself, stratified by class: docs/reference/data.md.

    Args:
        source: ``"digits"``, a path (``.npz``, ``.parquet`` or ``.tar`` file; folder of images by class, of images with
            a table, of a Hugging Face data set, of WebDataset shards), a pair (images, labels) of arrays, a map-style
            data set of such pairs, a :class:`Split`, or a dictionary of these by split, of which ``"train"`` must be
            there; a :class:`Dataset` as it is.
        seed: decides the cuts.
        val_fraction: share of the training images that becomes the validation split where the source has none.
        test_fraction: share of all images that becomes the test split where the source has none.
        options: columns, the size of images and the like; None for the defaults.
    Raises: UserError naming the argument, its rule and the value; FileNotFoundError for a missing path.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not isinstance(value, numbers.Real) or not 0 < value < 1:
            fail("data", name, "be in (0, 1)", value)
    if not isinstance(seed, numbers.Integral) or seed < 0:
        fail("data", "seed", "be an integer of at least 0", seed)
    dataset = read(source, options=options).dataset(seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    warnings = _shared(dataset)
    for warning in warnings:
        logger.warning("data: %s", warning)
    return dataclasses.replace(dataset, notes=tuple(dict.fromkeys((*dataset.notes, *warnings))))


class Source:
    """A source that was read, once for any number of cuts, as :func:`read` returns it."""

    def __init__(self, name: str, content: SourceContent):
        self.name, self.content, self._whole = name, content, None

    @property
    def has_splits(self) -> bool:
        """Whether nothing is cut, so that every seed has the same splits."""
        return {"train", "val", "test"} <= self.content.parts.keys()

    @property
    def given_splits(self) -> frozenset[str]:
        """The splits that the source has itself; the others are cut."""
        return frozenset(self.content.parts) - {"all"}

    def dataset(
        self,
        *,
        seed: int = 0,
        val_fraction: float = VAL_FRACTION,
        test_fraction: float = TEST_FRACTION,
        folder: Path | None = None,
    ) -> Dataset:
        """As :func:`load`; the same object again where nothing depends on the arguments.

        ``folder``: where image files of a set above 512 MiB are decoded to; its splits are memory maps of files there.
        """
        if self._whole is not None:
            return self._whole
        lists = {name: list(getattr(self.content, name)) for name in ("notes", "warnings")}
        content = dataclasses.replace(self.content, parts=dict(self.content.parts), **lists)
        cut(content, val_fraction, test_fraction, seed)
        _settle(content, folder)
        _check_classes(content)
        splits = [_split(content.parts[which]) for which in ("train", "val", "test")]
        dataset = Dataset(self.name, content.class_names, *splits)
        _validate(dataset)
        content.warnings += _repeated(dataset)
        dataset = dataclasses.replace(dataset, notes=_report(content, dataset.image_shape))
        self._whole = dataset if self.has_splits else None
        return dataset


def read(source: Any, *, options: ReadOptions | None = None) -> Source:
    """Read ``source`` without cutting it: as :func:`load`, for several seeds."""
    options = options or ReadOptions()
    name, content = _read(source, SIZES, options)
    in_one_size(content, options)
    _check_classes(content)
    return Source(name, content)


def load_uncut(
    source: Any, *, options: ReadOptions | None = None, folder: Path | None = None
) -> tuple[str, tuple[str, ...], dict[str, Split]]:
    """(name, class names, split -> images in the order of the source): as :func:`load`, but nothing is cut.

    A source without splits has one, "all"; digits is one. Images may have any size. ``folder``: as of
    :meth:`Source.dataset`. Raises: as :func:`load`.
    """
    options = options or ReadOptions()
    name, content = _read(source, None, options)
    in_one_size(content, options)
    _settle(content, folder)
    splits = {which: _split(part) for which, part in content.parts.items()}
    first = next(iter(splits.values()))
    for which, split in splits.items():
        if split.images.shape[1:] != first.images.shape[1:]:
            shapes = f"{list(split.images.shape[1:])} beside {list(first.images.shape[1:])}"
            fail("data", f"{which} images", "have the shape of the first split", shapes)
    _report(content, tuple(first.images.shape[1:]))
    return name, content.class_names, splits


def _settle(content: SourceContent, folder: Path | None) -> None:
    """Decode image files that are not decoded yet."""
    content.parts, notes, warnings = settled(content.parts, folder)
    content.notes, content.warnings = [*notes, *content.notes], [*warnings, *content.warnings]


def _split(part: Part) -> Split:
    images = ImageRows(part.images) if isinstance(part.images, MappedFile) else torch.from_numpy(part.images)
    return Split(images, *(None if array is None else torch.from_numpy(array) for array in part[1:]))


def _part(source: Any) -> Any:
    """A :class:`Split` as a part; anything else as it is."""
    if not isinstance(source, Split):
        return source
    tensors = (source.images[:], source.labels, source.groups)
    return Part(*(None if tensor is None else tensor.cpu().numpy() for tensor in tensors))


def _report(content: SourceContent, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Log the set in one line, and the warnings; returns the notes and the warnings."""
    order = [which for which in ("all", "train", "val", "test") if which in content.parts]
    sizes = ", ".join(f"{which} {len(content.parts[which].labels)}" for which in order)
    total = counted(sum(len(part.labels) for part in content.parts.values()), "image")
    classes = counted(len(content.class_names), "class")
    size, notes = " x ".join(map(str, shape)), [*content.notes, class_counts(content)]
    if (groups := [part.groups for part in content.parts.values()])[0] is not None:
        notes.append(f"images of {counted(len(np.unique(np.concatenate(groups))), 'group')}")
    logger.info("data: %s of %s (%s), %s; %s", total, classes, sizes, size, "; ".join(notes))
    for warning in content.warnings:
        logger.warning("data: %s", warning)
    return tuple(dict.fromkeys((*notes, *content.warnings)))  # a Dataset that is read again brings its own


def _read(source: Any, sizes: tuple[int, int] | None, options: ReadOptions) -> tuple[str, SourceContent]:
    """(name, content of the source)."""
    if isinstance(source, Dataset):
        content = arrays.read({which: _part(getattr(source, which)) for which in SPLITS}, options, sizes)[1]
        notes = [note for note in source.notes if note not in content.notes]
        return source.name, dataclasses.replace(content, class_names=source.class_names, notes=[*content.notes, *notes])
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, Mapping):
            return arrays.read({which: _part(each) for which, each in source.items()}, options, sizes)
        return arrays.read(_part(source), options, sizes)
    if not str(source):
        fail("data", "source", KINDS, repr(source))
    if str(source) == "digits":
        options.refuse(("table", *COLUMNS, "skip_unreadable"), "digits")
        return "digits", _digits()
    path = Path(os.path.expanduser(source))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        rule = f"data: source must {KINDS}"
        raise FileNotFoundError(f"{rule}, got {printable(source)}, which is not there") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"data: source must be a readable path, got {printable(source)} ({why})") from error
    if path.is_dir():
        return os.path.basename(os.path.abspath(path)), _directory(path, sizes, options)
    if path.suffix.lower() == ".npz":
        options.refuse(("table", *COLUMNS, "skip_unreadable"), "an .npz file")
        return path.stem, npz.read(path)
    if path.suffix.lower() == ".parquet":
        options.refuse(("table",), "a parquet file")
        return path.stem, hugging_face.read(path, [path], options, sizes)
    if path.suffix.lower() == ".tar":
        options.refuse(("table", *COLUMNS), "WebDataset shards")
        return path.stem, web_dataset.read(path, [path], options, sizes)
    remedy = kinds.IN_PLACE.get(path.suffix.lower())
    fail("data", "source", KINDS, printable(source) + (f" ({remedy})" if remedy else ""))


def _digits() -> SourceContent:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    parts = {"all": Part(images, bunch.target.astype(np.int64))}
    return SourceContent(parts, tuple(str(digit) for digit in range(10)), ["pixels in [0, 16], times 255 / 16"])


def _directory(path: Path, sizes: tuple[int, int] | None, options: ReadOptions) -> SourceContent:
    if options.table:
        return table.read(path, options, sizes)
    if folders.written_by_us(path):
        return _folder(path, sizes, options)  # which says so
    shards = kinds.shards(path)
    if hugging_face.saved_to_disk(path):
        return hugging_face.read(path, [], options, sizes)
    if shards.get(".parquet"):
        return hugging_face.read(path, shards[".parquet"], options, sizes)
    if shards.get(".tar"):
        options.refuse(COLUMNS, "WebDataset shards")
        return web_dataset.read(path, shards[".tar"], options, sizes)
    if (tables := table.metadata(path)) and (content := table.read_metadata(path, tables, options, sizes)):
        return content
    options.refuse(COLUMNS, "a folder class/image.png without a table")
    if what := kinds.other(path):
        got = f"{printable(path)}, a folder of {what}"
        fail("data", "source", "hold images as class/image.png, parquet files or WebDataset shards", got)
    return _folder(path, sizes, options)


def _folder(path: Path, sizes: tuple[int, int] | None, options: ReadOptions) -> SourceContent:
    classes, class_names, unread, suspect = folders.find(path)
    files = {which: [file for part in each for file in part] for which, each in classes.items()}
    labels = {
        which: np.repeat(np.arange(len(class_names), dtype=np.int64), list(map(len, each)))
        for which, each in classes.items()
    }
    parts, notes, warnings = decoded(files, labels, None, sizes, options)
    return SourceContent(parts, class_names, [*notes, *unread], [*suspect, *warnings])


def _check_classes(content: SourceContent) -> None:
    """Refuse too few or too many classes, and classes that are missing from the training images."""
    names = content.class_names
    if not CLASSES[0] <= len(names) <= CLASSES[1]:
        fail("data", "number of classes", f"be {CLASSES[0]} to {CLASSES[1]}", len(names))
    training = content.parts.get("train", content.parts.get("all")).labels
    if len(training) == 0:
        fail("data", "train split", "hold at least one image", 0)
    empty = np.flatnonzero(np.bincount(training, minlength=len(names)) == 0).tolist()
    if not empty:
        return
    anywhere = np.bincount(np.concatenate([part.labels for part in content.parts.values()]), minlength=len(names))
    got = f"none of {', '.join(names[index] for index in empty[:5])}{', ...' if len(empty) > 5 else ''}"
    if anywhere[0] == 0 and (anywhere[1:] > 0).all():
        got += f" (labels lie in [1, {len(names) - 1}]: subtract 1)"
    elif (anywhere[empty] == 0).any():
        got += " (np.unique(labels, return_inverse=True)[1] renumbers the labels of all splits without gaps)"
    else:
        counts = {which: int(np.isin(part.labels, empty).sum()) for which, part in content.parts.items()}
        places = " and ".join(f"{count} in {which}" for which, count in counts.items() if count)
        got += f" ({places}: move some of each class to train, or leave the class out)"
    fail("data", "every class", "have a training image", got)


def _validate(dataset: Dataset) -> None:
    height, width, _ = dataset.image_shape
    check_size(height, width, SIZES)
    for which in ("train", "val", "test"):
        split = getattr(dataset, which)
        if split.images.shape[1:] != dataset.train.images.shape[1:]:
            shapes = f"{list(split.images.shape[1:])} beside {list(dataset.image_shape)}"
            fail("data", f"{which} images", "have the shape of the training images", shapes)
        if len(split) == 0:
            fail("data", f"{which} split", "hold at least one image", 0)
    groups = {which: getattr(dataset, which).groups for which in ("train", "val", "test")}
    if all(each is not None for each in groups.values()):
        check_apart({which: each.numpy() for which, each in groups.items()}, "groups")


def _repeated(dataset: Dataset) -> list[str]:
    """Warnings on training images that are one image. Raises: UserError if all are."""
    known = dataset.train.digests
    (_, most), *_ = Counter(known).most_common(1)
    if most == len(known) > 1:
        values = dataset.train.images[0].unique().tolist()
        every = f", every pixel {values[0]}" if len(values) == 1 else ""
        fail("data", "training images", "differ", f"{most} that are all the same{every}")
    return [f"{most} of {len(known)} training images are one and the same"] if most * 2 > len(known) else []


def _shared(dataset: Dataset) -> list[str]:
    """Warnings on images of an earlier split; a run counts them with its near-duplicates."""
    warnings = []
    for which, other in (("val", "train"), ("test", "train"), ("test", "val")):
        known, others = getattr(dataset, which).digests, set(getattr(dataset, other).digests)
        if shared := sum(each in others for each in known):
            images = counted(len(known), f"{which} image")
            warnings.append(f"{shared} of {images} are byte-equal to {other} images")
    return warnings
