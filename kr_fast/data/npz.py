"""Images and class labels from an ``.npz`` in MedMNIST's layout, ``{train,val,test}_{images,labels}``."""

from pathlib import Path

import numpy as np

from kr_fast.data.pixel_range import to_uint8
from kr_fast.data.printable import counted, listed, printable
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
    """The splits of the file at ``path``; nothing but the arrays that are needed is read.

    Raises: UserError naming the key, its rule and what it holds; FileNotFoundError.
    """
    with open_npz(path, "data") as archive:
        keys = _keys(archive, path)
        labels = {which: _labels(archive.read(of["labels"]), of["labels"]) for which, of in keys.items()}
        names = {which: of["images"] for which, of in keys.items()}
        images = {}
        for which, name in names.items():
            images[name] = _with_channel(archive.read(name), name, len(labels[which]))
            _check_count(labels[which], len(images[name]), keys[which]["labels"])
        unread = [key for key in archive.keys if not any(key in of.values() for of in keys.values())]
    pixels, notes, warnings = to_uint8(images)
    parts = {which: Part(pixels[names[which]], labels[which]) for which in names}
    if unread:
        logger.info("data: keys not read: %s", listed("", unread, 8))
        notes.append(f"not read: {counted(len(unread), 'array')} of the file")
    classes = 1 + max(int(each.max(initial=0)) for each in labels.values())
    return SourceContent(parts, tuple(map(str, range(classes))), notes, warnings)


def read_labelled(path: Path, where: str, argument: str) -> tuple[np.ndarray, np.ndarray]:
    """One set without splits: uint8 ``[N, H, W, C]`` and int64 ``[N]``, from ``images`` and ``labels``.

    Other usual names are taken too, and ``arr_0`` and ``arr_1``, as ``kr-fast synthesize --format npz`` writes them.

    Args:
        where, argument: for errors, ``where: argument must ...``.
    Raises: UserError naming the argument or the key.
    """
    with open_npz(path, where, argument) as archive:
        unnamed = {"images": "arr_0", "labels": "arr_1"}
        keys = {
            what: next((key for key in (*names, unnamed[what]) if key in archive), None)
            for what, names in SYNONYMS.items()
        }
        if None in keys.values():
            got = f"{printable(path)} with {listed('', archive.keys, 8)}"
            fail(where, argument, "hold the keys images and labels", got)
        named = {what: f"{argument} {key}" for what, key in keys.items()}
        labels = _labels(archive.read(keys["labels"]), named["labels"])
        images = _with_channel(archive.read(keys["images"]), named["images"], len(labels))
        _check_count(labels, len(images), named["labels"])
    pixels, _, warnings = to_uint8({named["images"]: images})
    for warning in warnings:
        logger.warning("%s: %s", where, warning)
    return pixels[named["images"]], labels


def _keys(archive: Npz, path: Path) -> dict[str, dict[str, str]]:
    """split -> {"images": key, "labels": key}; ``val`` may be missing, or be called ``valid`` or ``validation``."""
    keys = {}
    for which in SPLITS:
        names = ("val", "valid", "validation") if which == "val" else (which,)
        present = [(name, what) for name in names for what in SYNONYMS if f"{name}_{what}" in archive]
        if len({name for name, _ in present}) > 1:
            got = f"{printable(path)} with {listed('', [f'{name}_{what}' for name, what in present], 4)}"
            fail("data", "source", "hold one validation split", got)
        keys[which] = {what: f"{name}_{what}" for name, what in present}
    needed = [f"{which}_{what}" for which in ("train", "test") for what in SYNONYMS]
    missing = [key for key in needed if key not in archive]
    if missing:
        content = f"it holds {listed('', archive.keys, 8)}" if archive.keys else "it holds no array"
        renames = [f"{key} to {new}" for key in archive.keys if (new := _meant(key)) in missing]
        remedy = f"; rename {', '.join(renames)}" if renames else ""
        got = f"{printable(path)} without {', '.join(missing)} ({content}{remedy})"
        fail("data", "source", f"hold the keys {', '.join(needed)}", got)
    if len(keys["val"]) == 1:
        name = next(iter(keys["val"].values())).rpartition("_")[0]
        have, lack = ("images", "labels") if "images" in keys["val"] else ("labels", "images")
        fail("data", "source", f"hold {name}_{lack} beside {name}_{have}", printable(path))
    return {which: of for which, of in keys.items() if of}


def _meant(key: str) -> str | None:
    """The key that ``x_train``, ``TrainLabels`` and the like stand for; None for another."""
    which, parts = splits_in(key), words(key)
    what = {what for what, names in SYNONYMS.items() if set(names) & set(parts)}
    return f"{which.pop()}_{what.pop()}" if len(parts) == 2 and len(which) == len(what) == 1 else None


def _with_channel(images: np.ndarray, name: str, count: int) -> np.ndarray:
    """``images`` as ``[N, H, W, C]``."""
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    got = str(list(images.shape))
    if images.ndim == 4 and images.shape[1] in (1, 3):
        got += " (x.transpose(0, 2, 3, 1) makes [N, H, W, C] of [N, C, H, W])"
    elif images.ndim == 4 and images.shape[3] == count and images.shape[2] in (1, 3):
        got += " (x.transpose(3, 0, 1, 2) makes [N, H, W, C] of [H, W, C, N])"
    elif images.ndim == 4 and images.shape[3] == 4:
        got += " (of RGBA keep x[..., :3], composed on a background)"
    elif images.ndim == 2:
        got += " (x.reshape(-1, H, W) makes images of rows)"
    fail("data", name, "have shape [N, H, W], [N, H, W, 1] or [N, H, W, 3]", got)


def _labels(labels: np.ndarray, name: str) -> np.ndarray:
    """int64 ``[N]`` of integers or bool, ``[N]`` or ``[N, 1]``."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        rule = "have shape [N] or [N, 1] (one class an image)"
        fail("data", name, rule, f"{list(labels.shape)}{_how_to_flatten(labels)}")
    if labels.dtype.kind == "b":
        return labels.astype(np.int64)
    if labels.dtype.kind not in "iu":
        remedy = ""
        if labels.dtype.kind in "SU":
            remedy = " (np.unique(x, return_inverse=True)[1] makes integers of names)"
        elif labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
            remedy = " (they are whole numbers: x.astype(np.int64))"
        fail("data", name, "be integers", f"{labels.dtype}{remedy}")
    if len(labels) and (labels.min() < 0 or labels.max() >= CLASSES[1]):
        remedy = ""
        if set(np.unique(labels)) == {-1, 1}:
            remedy = " (of two classes -1 and 1, labels > 0 makes False and True)"
        fail("data", name, f"lie in [0, {CLASSES[1]})", f"[{labels.min()}, {labels.max()}]{remedy}")
    return labels.astype(np.int64)


def _how_to_flatten(labels: np.ndarray) -> str:
    if labels.ndim == 2 and labels.shape[0] == 1:
        return " (x[0] makes [N] of [1, N])"
    if labels.ndim == 2 and labels.dtype.kind in "biuf" and labels.size and np.isin(labels, (0, 1)).all():
        if (labels.astype(np.int64).sum(1) == 1).all():
            return " (x.argmax(1) makes classes of one-hot rows)"
        return " (several labels an image are not supported)"
    return ""


def _check_count(labels: np.ndarray, count: int, name: str) -> None:
    if len(labels) != count:
        fail("data", name, f"have shape [{count}] or [{count}, 1] (one class an image)", list(labels.shape))
