"""Which kind of data set a folder holds, by the files in it."""

import os
from collections import Counter
from pathlib import Path

from kr_fast.data.folders import SUFFIXES, SYSTEM

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
}


def shards(path: Path) -> dict[str, list[Path]]:
    """Suffix of ``SHARDS`` -> the files with it, by name; nothing where the folder holds images too."""
    found: dict[str, list[Path]] = {}
    for base, folders, names in os.walk(path):
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
    for _, folders, names in os.walk(path):
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
