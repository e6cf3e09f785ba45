"""Images and class labels from an ``.npz`` in MedMNIST's layout, ``{train,val,test}_{images,labels}``."""

from collections import Counter
from pathlib import Path

import numpy as np

from kr_fast.data.pixel_range import to_uint8
from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.readers import columns
from kr_fast.data.splits import CLASSES, Part, SourceContent, splits_in, words
from kr_fast.runtime.array_files import Npz, open_npz
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger

SPLITS = ("train", "val", "test")
SYNONYMS = {
    "images": ("x", "image", "images", "img", "imgs", "data", "pixels"),
    "labels": ("y", "label", "labels", "target", "targets"),
}


def read(path: Path) -> SourceContent:
    """The splits of the file at ``path``, or its one set ``all``; nothing but the arrays that are needed is read.

    Raises: UserError naming the key, its rule and what it holds; FileNotFoundError.
    """
    notes: list[str] = []
    with open_npz(path, "data") as archive:
        keys = _keys(archive, path, notes)
        labels = {which: labels_of(archive.read(of["labels"]), of["labels"], notes) for which, of in keys.items()}
        names = {which: of["images"] for which, of in keys.items()}
        images = {}
        for which, name in names.items():
            images[name] = with_channel(archive.read(name), name, len(labels[which]), notes)
            check_count(labels[which], len(images[name]), keys[which]["labels"])
        unread = [key for key in archive.keys if not any(key in of.values() for of in keys.values())]
    pixels, done, warnings = to_uint8(images)
    class_names, labels = class_numbers(labels, {which: of["labels"] for which, of in keys.items()})
    parts = {which: Part(pixels[names[which]], labels[which]) for which in names}
    if unread:
        logger.info("data: keys not read: %s", listed("", unread, 8))
        notes.append(f"not read: {counted(len(unread), 'array')} of the file")
    return SourceContent(parts, class_names, [*done, *dict.fromkeys(notes)], warnings)


def class_numbers(labels: dict[str, np.ndarray], keys: dict[str, str]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """(names of the classes, split -> int64 ``[N]``) of what :func:`labels_of` returned of each split.

    Raises: UserError if some are names and others numbers.
    """
    named = [which for which, each in labels.items() if each.dtype.kind == "U"]
    if not named:
        classes = 1 + max(int(each.max(initial=0)) for each in labels.values())
        return tuple(map(str, range(classes))), labels
    if len(named) < len(labels):
        other = next(which for which in labels if which not in named)
        fail("data", keys[other], f"hold names of classes, as {keys[named[0]]} does", labels[other].dtype)
    return columns.classes({which: each.tolist() for which, each in labels.items()}, keys[named[0]])


def read_labelled(path: Path, where: str, argument: str) -> tuple[np.ndarray, np.ndarray]:
    """One set without splits: uint8 ``[N, H, W, C]`` and int64 ``[N]``, from ``images`` and ``labels``.

    Other usual names are taken too, and ``arr_0`` and ``arr_1``, as ``kr-fast synthesize --format npz`` writes them.

    Args:
        where, argument: for errors, ``where: argument must ...``.
    Raises: UserError naming the argument or the key.
    """
    with open_npz(path, where, argument) as archive:
        keys = _of_one_set(archive)
        if len(keys) < 2:
            got = f"{printable(path)} with {listed('', archive.keys, 8)}"
            fail(where, argument, "hold the keys images and labels", got)
        named = {what: f"{argument} {key}" for what, key in keys.items()}
        labels = labels_of(archive.read(keys["labels"]), named["labels"], [])
        if labels.dtype.kind == "U":
            fail("data", named["labels"], "be integers", labels.dtype)
        images = with_channel(archive.read(keys["images"]), named["images"], len(labels), [])
        check_count(labels, len(images), named["labels"])
    pixels, _, warnings = to_uint8({named["images"]: images})
    for warning in warnings:
        logger.warning("%s: %s", where, warning)
    return pixels[named["images"]], labels


def _of_one_set(archive: Npz) -> dict[str, str]:
    """{"images": key, "labels": key} of a file without splits, those of the two that it has."""
    unnamed = {"images": "arr_0", "labels": "arr_1"}
    known = {key.lower(): key for key in reversed(archive.keys)} | {key: key for key in archive.keys}  # X too
    keys = {
        what: next((known[key] for key in (*names, unnamed[what]) if key in known), None)
        for what, names in SYNONYMS.items()
    }
    return {what: key for what, key in keys.items() if key is not None}


def _keys(archive: Npz, path: Path, notes: list[str]) -> dict[str, dict[str, str]]:
    """split -> {"images": key, "labels": key}; ``val`` may be missing, or be called ``valid`` or ``validation``.

    Keys such as ``x_train`` and ``testLabels`` are taken where one alone has this meaning; a file without any key of a
    split has one set, ``all``.
    """
    keys = {}
    for which in SPLITS:
        names = ("val", "valid", "validation") if which == "val" else (which,)
        present = [(name, what) for name in names for what in SYNONYMS if f"{name}_{what}" in archive]
        if len({name for name, _ in present}) > 1:
            got = f"{printable(path)} with {listed('', [f'{name}_{what}' for name, what in present], 4)}"
            fail("data", "source", "hold one validation split", got)
        keys[which] = {what: f"{name}_{what}" for name, what in present}
    if not any(keys.values()):
        if not any(map(splits_in, archive.keys)) and len(of := _of_one_set(archive)) == 2:
            return {"all": of}
        meant = Counter(filter(None, map(_meant, archive.keys)))
        if all(count == 1 for count in meant.values()):
            for key in archive.keys:
                if name := _meant(key):
                    which, what = name.split("_")
                    keys[which][what] = key
            others = [key for of in keys.values() for key in of.values()]
            notes += [f"read from {', '.join(others)}"] if others else []
    needed = [f"{which}_{what}" for which in ("train", "test") for what in SYNONYMS]
    missing = [key for key in needed if key.split("_")[1] not in keys[key.split("_")[0]]]
    if missing:
        content = f"it holds {listed('', archive.keys, 8)}" if archive.keys else "it holds no array"
        renames = [f"{key} to {new}" for key in archive.keys if (new := _meant(key)) in missing]
        remedy = f"; rename {', '.join(renames)}" if renames else ""
        got = f"{printable(path)} without {', '.join(missing)} ({content}{remedy})"
        fail("data", "source", f"hold the keys {', '.join(needed)}", got)
    if len(keys["val"]) == 1:
        key = next(iter(keys["val"].values()))
        have, lack = ("images", "labels") if "images" in keys["val"] else ("labels", "images")
        name = key.removesuffix(f"_{have}") if key.endswith(f"_{have}") else "val"
        fail("data", "source", f"hold {name}_{lack} beside {key}", printable(path))
    return {which: of for which, of in keys.items() if of}


def _meant(key: str) -> str | None:
    """The key that ``x_train``, ``TrainLabels`` and the like stand for; None for another."""
    which, parts = splits_in(key), words(key)
    what = {what for what, names in SYNONYMS.items() if set(names) & set(parts)}
    return f"{which.pop()}_{what.pop()}" if len(parts) == 2 and len(which) == len(what) == 1 else None


def with_channel(images: np.ndarray, name: str, count: int, notes: list[str]) -> np.ndarray:
    """``images`` as ``[N, H, W, C]``; ``[N, C, H, W]`` is transposed, and a note says so."""
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):  # whose last axis would be a height or width below 8 px
        notes.append("images [N, C, H, W] transposed to [N, H, W, C]")
        return images.transpose(0, 2, 3, 1)
    got = str(list(images.shape))
    if images.ndim == 4 and images.shape[3] == count and images.shape[2] in (1, 3):
        got += " (x.transpose(3, 0, 1, 2) makes [N, H, W, C] of [H, W, C, N])"
    elif images.ndim == 4 and 4 in (images.shape[1], images.shape[3]):
        got += " (of RGBA keep the first three channels, composed on a background)"
    elif images.ndim >= 4 and min(images.shape[1:4]) >= 8:
        got += " (of volumes take slices first)"
    elif images.ndim == 2:
        got += " (x.reshape(-1, H, W) makes images of rows)"
    fail("data", name, "have shape [N, H, W], [N, H, W, 1] or [N, H, W, 3]", got)


def labels_of(labels: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    """``[N]``, int64 numbers or text of names; of ``[N]``, ``[N, 1]`` or one-hot ``[N, K]``; notes are added."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and _is_one_hot(labels):
        notes.append("one-hot labels read as the index of the 1")
        return labels.argmax(1).astype(np.int64)
    if labels.ndim != 1:
        rule = "have shape [N] or [N, 1] (one class an image)"
        fail("data", name, rule, f"{list(labels.shape)}{_how_to_flatten(labels)}")
    if labels.dtype.kind == "b":
        return labels.astype(np.int64)
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):  # a column of pandas
        labels = labels.astype(str)
    if labels.dtype.kind in "SU":
        notes.append("labels are names of classes")
        return np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
        notes.append(f"{labels.dtype} labels, which are whole numbers, read as integers")
    elif labels.dtype.kind not in "iu":
        fail("data", name, "be integers or names of classes", labels.dtype)
    if len(labels) and (labels.min() < 0 or labels.max() >= CLASSES[1]):
        remedy = ""
        if set(np.unique(labels)) == {-1, 1}:
            remedy = " (of two classes -1 and 1, labels > 0 makes False and True)"
        fail("data", name, f"lie in [0, {CLASSES[1]})", f"[{labels.min()}, {labels.max()}]{remedy}")
    return labels.astype(np.int64)


def _is_one_hot(labels: np.ndarray) -> bool:
    if labels.dtype.kind not in "biuf" or labels.shape[1] < 2 or not labels.size:
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.astype(np.int64).sum(1) == 1).all())


def _how_to_flatten(labels: np.ndarray) -> str:
    if labels.ndim == 2 and labels.shape[0] == 1:
        return " (x[0] makes [N] of [1, N])"
    if labels.ndim == 2 and labels.dtype.kind in "biuf" and labels.size and np.isin(labels, (0, 1)).all():
        return " (several labels an image are not supported)"
    return ""


def check_count(labels: np.ndarray, count: int, name: str) -> None:
    """Refuse other than ``count`` labels."""
    if len(labels) != count:
        fail("data", name, f"have shape [{count}] or [{count}, 1] (one class an image)", list(labels.shape))
