"""The content of a source, the usual names of splits, and the cuts of splits that a source lacks."""

import dataclasses
import re
from typing import NamedTuple

import numpy as np

from kr_fast.data.groups import cut_by_group
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage.image_rows import MappedFile

SIZES = (8, 224)
CLASSES = (2, 1000)
LISTED = 12  # classes whose images are counted one by one
VAL_FRACTION, TEST_FRACTION = 0.15, 1 / 3  # where a set has no such split: of the training images, of all images
NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
NAMES |= {"test": "test", "testing": "test"}


class Part(NamedTuple):
    """``images``: uint8 ``[N, H, W, C]``; ``labels``: int64 ``[N]``; ``groups``: int64 ``[N]``, or None."""

    images: np.ndarray | MappedFile
    labels: np.ndarray
    groups: np.ndarray | None = None

    def rows(self, which: np.ndarray) -> "Part":
        """The rows that ``which`` selects, a mask or indices."""
        return Part(*(None if array is None else array[which] for array in self))


@dataclasses.dataclass
class SourceContent:
    """The content of a source.

    ``parts``: those of ``train``, ``val`` and ``test`` that it has, or ``all``; ``notes``: what was done with pixels,
    and what was not read, without names of files; ``warnings``: what makes a result unreliable.
    """

    parts: dict[str, Part]
    class_names: tuple[str, ...]
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def class_counts(content: SourceContent) -> str:
    """How many images of each class each split has, in words; of many classes the least and the most."""
    order = [which for which in ("all", "train", "val", "test") if which in content.parts]
    counts = [np.bincount(content.parts[which].labels, minlength=len(content.class_names)) for which in order]
    where = "" if order == ["all"] else f" in {' / '.join(order)}"
    if len(content.class_names) > LISTED:
        return f"images of each class{where}: {' / '.join(f'{each.min()} to {each.max()}' for each in counts)}"
    rows = zip(content.class_names, zip(*counts, strict=True), strict=True)
    each = [f"{name} ({' / '.join(map(str, row))})" for name, row in rows]
    return f"images of each class{where}: {', '.join(each)}"


def split_name(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for the usual names of these in any case; None for another."""
    return NAMES.get(name.lower())


def words(name: str) -> list[str]:
    """``["train", "images"]`` of ``train_images``, ``TrainImages`` or ``TRAIN-IMAGES``."""
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())


def splits_in(name: str) -> set[str]:
    """The splits that words of ``name`` stand for: train of ``training_set``."""
    return {which for which in map(split_name, words(name)) if which}


def cut(content: SourceContent, val_fraction: float, test_fraction: float, seed: int) -> None:
    """Cut the splits that are missing, by class: test of all images, or of the training images; then validation.

    Where images have groups, whole groups are cut, by class as far as these allow.
    """
    parts = content.parts
    missing = {"val", "test"} - parts.keys()
    if "all" in parts:
        parts["train"], parts["test"] = _stratified(parts.pop("all"), test_fraction, seed)
    elif "test" not in parts:
        parts["train"], parts["test"] = _stratified(parts["train"], test_fraction, seed)
        content.notes.append(f"no test split: {test_fraction:.3g} of the training images are taken for it")
    if "val" not in parts:
        parts["train"], parts["val"] = _stratified(parts["train"], val_fraction, seed)
    for which in ("test", "val"):
        if which in missing and len(parts[which].labels) == 0:
            what = "one" if parts["train"].groups is None else "a group"
            got = f"0 (no class has {what} for each split that is cut)"
            fail("data", f"{which} split", "hold at least one image", got)


def _stratified(part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    """(rest, cut): ``fraction`` of each class is cut, and at least one image of each class stays.

    Where ``fraction`` of no class is an image, one of each class is cut.
    """
    labels = part.labels
    if part.groups is not None:
        out = cut_by_group(labels, part.groups, fraction, seed)
        return part.rows(~out), part.rows(out)
    random = np.random.default_rng(seed)
    out = np.zeros(len(labels), dtype=bool)
    classes, counts = np.unique(labels, return_counts=True)
    least = 0 if any(round(count * fraction) for count in counts) else 1
    for label in classes:
        members = random.permutation(np.flatnonzero(labels == label))
        out[members[: min(max(round(len(members) * fraction), least), len(members) - 1)]] = True
    return part.rows(~out), part.rows(out)


def check_size(height: int, width: int, sizes: tuple[int, int] | None) -> None:
    """Refuse images that are not of ``sizes``, least and greatest; None allows any."""
    if sizes is not None and not (sizes[0] <= height <= sizes[1] and sizes[0] <= width <= sizes[1]):
        fail("data", "image size", f"be {sizes[0]} to {sizes[1]} px on both sides", f"{height} x {width}")
