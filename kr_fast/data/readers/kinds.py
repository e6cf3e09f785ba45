"""Which kind of data set a folder holds, by the files in it, and which split each file is of."""

import os
from collections import Counter
from pathlib import Path

from kr_fast.data.folders import SUFFIXES, SYSTEM
from kr_fast.data.printable import listed, printable
from kr_fast.data.readers.table_file import SUFFIXES as TABLES
from kr_fast.data.splits import splits_in
from kr_fast.runtime.errors import fail

SHARDS = (".parquet", ".arrow", ".tar")
DEPTH = 3  # of folders that are searched for shards: configuration/split/0000.parquet
# Files that tell a kind which is not read, and how its users make one that is.
OTHERS = {
    ".tfrecord": "TFRecord files",
    ".mds": "shards of MosaicML streaming",
    ".mdb": "an LMDB data base",
    ".h5": "HDF5 files",
    ".hdf5": "HDF5 files",
    ".beton": "FFCV files",
    ".rec": "RecordIO files of MXNet",
    ".nii": "NIfTI volumes",
    ".mat": "MATLAB files",
    ".pkl": "pickles, which are not read",
    ".npy": "arrays (np.savez makes one .npz of them)",
    ".npz": "an .npz (give the file itself)",
    ".jsonl": "JSON lines",
    ".zip": "archives (unpack them first)",
}
# Files that are no source, and what to give in their place.
IN_PLACE = {
    **dict.fromkeys((".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), "unpack it, and give what it holds"),
    **dict.fromkeys(TABLES, "give the folder of the images, and this file as --table"),
    **dict.fromkeys(SUFFIXES, "give the folder that holds one folder of images for each class"),
    ".npy": "np.savez makes one .npz of arrays",
    ".arrow": "give the folder that save_to_disk wrote",
}


def shards(path: Path) -> dict[str, list[Path]]:
    """Suffix of ``SHARDS`` -> the files with it, by name; nothing where the folder holds images too."""
    found: dict[str, list[Path]] = {}
    for base, folders, names in os.walk(path):
        if _has_links(base, folders):
            return {}
        folders[:] = [each for each in folders if not each.startswith(".") and each not in SYSTEM]
        deep = len(Path(base).parts) - len(path.parts)
        for name in names:
            suffix = Path(name).suffix.lower()
            if not name.startswith(".") and suffix in SHARDS and deep <= DEPTH:
                found.setdefault(suffix, []).append(Path(base) / name)
            elif suffix in SUFFIXES and not name.startswith("."):
                return {}
    return {suffix: sorted(each, key=lambda file: file.parts) for suffix, each in found.items()}


def other(path: Path) -> str | None:
    """What the folder holds in place of images, in words; None where nothing is known."""
    counts: Counter = Counter()
    for base, folders, names in os.walk(path):
        if _has_links(base, folders):
            return None
        folders[:] = [each for each in folders if not each.startswith(".")]
        for name in names:
            suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
            if any(suffix in SUFFIXES for suffix in suffixes):
                return None
            counts.update(OTHERS[suffix] for suffix in suffixes if suffix in OTHERS)
            if "tfrecord" in name and ".tfrecord" not in suffixes:
                counts[OTHERS[".tfrecord"]] += 1
            if name.endswith("-ubyte") or name.endswith("-ubyte.gz"):
                counts["files of MNIST's format (np.savez makes an .npz of them)"] += 1
    return counts.most_common(1)[0][0] if counts else None


def _has_links(base: str, folders: list[str]) -> bool:
    """Whether a folder is a link: images may lie behind it, where this search does not go."""
    return any(os.path.islink(os.path.join(base, each)) for each in folders)


def by_split(path: Path, shards: list[Path]) -> dict[str, list[Path]]:
    """split -> files, by a word of the name or of a folder: ``train-00000-of-00001.parquet``, ``test/0.parquet``.

    A file given as ``path`` itself, and files without such a word, are of the one split ``all``.
    Raises: UserError for files of two splits, of several folders, with and without split.
    """
    if path.is_file():
        return {"all": shards}
    splits: dict[str, list[Path]] = {}
    places: dict[str, set[Path]] = {}
    for shard in shards:
        below = shard.relative_to(path)
        which = splits_in(below.stem) or set().union(*map(splits_in, below.parts[:-1]))
        if len(which) > 1:
            fail("data", "source", "have one split in the name of a file", printable(below))
        splits.setdefault(next(iter(which), "all"), []).append(shard)
        places.setdefault(next(iter(which), "all"), set()).add(shard.parent)
    if several := next((sorted(each) for each in places.values() if len(each) > 1), None):
        got = f"{listed('', [each.relative_to(path) for each in several])} (give the folder of one)"
        fail("data", "source", "hold the files of a split in one folder, those of one configuration", got)
    if "all" in splits and len(splits) > 1:
        got = f"{printable(splits['all'][0].name)} beside {printable(next(iter(splits.values()))[0].name)}"
        fail("data", "source", "have a split in the name of every file, or of none", got)
    return splits if "all" in splits else in_order(splits, path)


def in_order(splits: dict[str, list[Path]], path: Path) -> dict[str, list[Path]]:
    """Splits in their usual order. Raises: UserError without a train split."""
    if "train" not in splits:
        got = f"{listed('', list(splits)) or 'none'} in {printable(path)}"
        fail("data", "source", "hold a train split", got)
    return {which: splits[which] for which in ("train", "val", "test") if which in splits}
