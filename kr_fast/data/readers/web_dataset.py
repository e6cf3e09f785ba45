"""WebDataset shards: tar files of samples ``KEY.png`` (or another image, or ``KEY.npy``) and ``KEY.cls``."""

import dataclasses
import os
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from kr_fast.data.folders import SUFFIXES
from kr_fast.data.options import ReadOptions
from kr_fast.data.packed import Packed
from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.readers import columns, kinds
from kr_fast.data.readers.decoding import decoded, from_arrays
from kr_fast.data.splits import SourceContent
from kr_fast.runtime.array_files import DAMAGE, npy_of, other_format_of
from kr_fast.runtime.errors import UserError, fail, first_line

LABEL, ARRAY = ".cls", ".npy"
LONGEST_LABEL = 4096  # bytes


@dataclasses.dataclass(frozen=True)
class _Member:
    """The bytes of a member of an uncompressed tar file, read when it is called."""

    shard: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        with open(self.shard, "rb") as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) < self.size:
            raise ValueError(f"it ends after {len(content)} of {self.size} bytes")
        return content


def read(path: Path, shards: list[Path], options: ReadOptions, sizes: tuple[int, int] | None) -> SourceContent:
    """The samples of the tar files ``shards`` in or at ``path``, in the order of shards and of their first members.

    Raises: UserError naming the shard and the sample.
    """
    images: dict[str, list[Packed]] = {}
    texts: dict[str, list[str]] = {}
    unread: Counter = Counter()
    kinds_of: dict[str, str] = {}
    partial: list[str] = []
    total = 0
    for which, each in kinds.by_split(path, shards).items():
        images[which], texts[which] = [], []
        for shard in each:
            for key, sample in _samples(shard, unread).items():
                total += 1
                image = [suffix for suffix in sample if suffix in SUFFIXES or suffix == ARRAY]
                name = f"{shard.name}: {key}"
                if len(image) > 1:
                    fail(
                        "data", "source", "have one image in each sample", f"{printable(name)} with {listed('', image)}"
                    )
                if not image or LABEL not in sample:
                    partial.append(f"{name} without {'an image' if not image else LABEL}")
                    continue
                kinds_of.setdefault(ARRAY if image[0] == ARRAY else "", name)
                unread.update(suffix for suffix in sample if suffix not in (image[0], LABEL))
                images[which].append(Packed(f"{name}{image[0]}", sample[image[0]]))
                texts[which].append(_text(sample[LABEL], f"{name}{LABEL}"))
    if partial and not (options.skip_unreadable and len(partial) < total):
        remedy = "; --skip-unreadable leaves them out and counts them" if len(partial) < total else ""
        got = f"{counted(len(partial), 'sample')} of {total} that are not: {listed('', partial)}{remedy}"
        fail("data", "every sample", f"hold an image and a class, KEY.png and KEY{LABEL}", got)
    if not total:
        fail("data", "source", "hold at least one image", f"none in {printable(path)}")
    if len(kinds_of) > 1:
        got = f"{printable(kinds_of[ARRAY])}{ARRAY} beside images as {printable(kinds_of[''])}"
        fail("data", "source", "hold arrays or encoded images, and not both", got)
    if all(text.isascii() and text.isdecimal() for each in texts.values() for text in each):
        # The package webdataset reads numbers; writers, kr-fast too, fill them with zeros.
        texts = {which: [str(int(text)) for text in each] for which, each in texts.items()}
    names, labels = columns.classes(texts, f"{LABEL} of the samples")
    if ARRAY in kinds_of:
        arrays = {which: _stacked(each) for which, each in images.items()}
        parts, notes, warnings = from_arrays(arrays, labels, None, f"{ARRAY} of the samples")
    else:
        parts, notes, warnings = decoded(images, labels, None, sizes, options)
    if partial:
        notes = [*notes, f"left out: {counted(len(partial), 'sample')} without an image or a class"]
    others = [suffix for suffix, _ in unread.most_common()]
    if others:
        notes = [*notes, f"not read: {counted(unread.total(), 'member')} of shards ({listed('', others, 5)})"]
    return SourceContent(parts, names, notes, warnings)


def _samples(shard: Path, unread: Counter) -> dict[str, dict[str, _Member]]:
    """Key -> suffix -> member, as the package webdataset groups them: a suffix begins at the first point of a name."""
    samples: dict[str, dict[str, _Member]] = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                stem, point, suffix = path.name.partition(".")
                if member.isdir():
                    continue
                if not member.isreg() or member.sparse is not None or not stem or not point:
                    unread["hidden" if not stem else "other"] += 1
                    continue
                if member.offset_data + member.size > size:
                    raise ValueError(f"{printable(member.name)} goes beyond its end")
                key, suffix = str(path.parent / stem), f".{suffix.lower()}"
                if suffix in samples.setdefault(key, {}):
                    fail(
                        "data",
                        "source",
                        "hold each member once",
                        f"{printable(member.name)} again in {printable(shard)}",
                    )
                samples[key][suffix] = _Member(shard, member.offset_data, member.size)
    except UserError:
        raise
    except (*DAMAGE, tarfile.TarError, LookupError) as error:
        got = f"{printable(shard)} ({other_format_of(shard) or first_line(error)})"
        raise UserError(f"data: source must hold readable, uncompressed .tar files, got {got}") from error
    return samples


def _text(member: _Member, name: str) -> str:
    if member.size > LONGEST_LABEL:
        fail("data", "class", f"be text of at most {LONGEST_LABEL} bytes", f"{member.size} in {printable(name)}")
    try:
        return member().decode("utf-8").strip()
    except (UnicodeDecodeError, ValueError, OSError) as error:
        raise UserError(f"data: class must be text in UTF-8, got {printable(name)} ({first_line(error)})") from error


def _stacked(members: list[Packed]) -> np.ndarray:
    """``[N, ...]`` of arrays of one shape and dtype."""
    arrays = [npy_of(member.content(), f"data: source, {printable(member.name)},") for member in members]
    first = arrays[0] if arrays else np.zeros((0, 1, 1, 1), np.uint8)
    for member, array in zip(members, arrays, strict=True):
        if array.shape != first.shape or array.dtype != first.dtype:
            got = f"{array.dtype} {list(array.shape)} in {printable(member.name)}"
            got += f" beside {first.dtype} {list(first.shape)}"
            fail("data", "arrays of samples", "have one shape and dtype", got)
    return np.stack(arrays) if arrays else first
