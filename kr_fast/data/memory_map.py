"""Sets larger than memory: image files decoded once into files of pixels, of which ``Split.images`` are memory maps.

``FOLDER/train.u8`` and so on hold uint8 ``[N, H, W, C]``. ``FOLDER/manifest.json`` holds for each block of them the
SHA-256 of its pixels and of what they were made from (names, sizes and dates of the files, how they are read): a block
whose two hashes are as before is kept, any other is made anew. So a conversion that was stopped continues, a damaged
block is repaired, and a file that was replaced costs one block. A block with files that could not be read is made anew
too, which names them. No name of a file is stored. What a process has mapped, no other one writes to.
"""

import dataclasses
import fcntl
import hashlib
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from kr_fast.data.image_files import FileImages, FileRows, Tally
from kr_fast.data.packed import ImageFile, Packed
from kr_fast.runtime import state
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import MappedFile
from kr_fast.runtime.storage.manifest import NO_LOCKS

BLOCK = 1 << 25  # bytes of pixels that are decoded, written and hashed at a time
MANIFEST, LOCK, README = "manifest.json", ".lock", "README.txt"
VERSION = 2  # of what a block's second hash stands for
TEXT = """Real images, decoded by kr-fast for the run or audit beside this folder. They must not leave the institution.
The folder may be removed: the same command makes it again from the same files.
"""


@dataclasses.dataclass
class Block:
    """``rows`` images that were read, of those that ``source`` is the hash of; ``skipped``: which could not be."""

    rows: int
    skipped: list[int]
    source: str
    sha256: str
    notes: dict[str, int]
    counts: list[int]
    ends: list[int]

    @property
    def tally(self) -> Tally:
        """What decoding showed."""
        return Tally(Counter(self.notes), tuple(self.counts), tuple(self.ends), len(self.skipped))


class _Lock:
    """The lock on a folder of maps: exclusive while they are written, then shared for as long as one is in use."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close):  # as Python ends, modules may be gone
        close(self._descriptor)

    def take(self, how: int) -> bool:
        """Whether it was taken, without waiting. On a file system without locks it always is."""
        try:
            fcntl.flock(self._descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True


# Those of this process by the file's device and inode: a second lock of its own would be in its way.
_locks: "weakref.WeakValueDictionary[tuple[int, int], _Lock]" = weakref.WeakValueDictionary()


def convert(folder: Path, parts: dict[str, FileRows]) -> FileImages:
    """The images of ``parts``, all of one survey, as memory maps of files in ``folder``, which are made where needed.

    Pages of a map are read when they are used, and given back when memory is short; what is written to it stays in this
    process. Of several processes under Accelerate, the first converts.
    Raises: UserError for files that cannot be read, for a full disk, where another command is converting, and where
        another process has mapped other images from ``folder``.
    """
    lock = None
    with state.current().main_first() as main:
        if main:
            lock = _convert(folder, parts)
    blocks, pixels, kept = _read(folder / MANIFEST), {}, {}
    survey, tallies = next(iter(parts.values())).survey, {}
    for which, part in parts.items():
        kept[which], start = np.ones(len(part), bool), 0
        for block in blocks[which]:
            kept[which][[start + row for row in block.skipped]] = False
            start += block.rows + len(block.skipped)
            tallies[part.name] = tallies.get(part.name, Tally()) + block.tally
        pixels[which] = MappedFile(_path(folder, which), (int(kept[which].sum()), *part.shape[1:]), lock)
    return FileImages(pixels, kept, *survey.report(tallies))


def _convert(folder: Path, parts: dict[str, FileRows]) -> _Lock:
    """Bring the files in ``folder`` up to date; returns the lock, shared, to be kept while they are mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        if lock.take(fcntl.LOCK_EX):
            _write_files(folder, parts)
        elif not lock.take(fcntl.LOCK_SH):
            fail("data", "images", "be converted by one command at a time", f"another at work in {folder}")
        elif not _is_up_to_date(folder, parts):
            rule = f"be those that another process has mapped from {folder}, until it ends"
            fail("data", "images", rule, "others (of other files, or read in another way)")
    finally:
        lock.take(fcntl.LOCK_SH)
    return lock


def _lock(folder: Path) -> _Lock:
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    status = os.fstat(descriptor)
    known = _locks.get((status.st_dev, status.st_ino))
    if known is None:
        known = _locks[status.st_dev, status.st_ino] = _Lock(descriptor)
    else:
        os.close(descriptor)
    return known


def _is_up_to_date(folder: Path, parts: dict[str, FileRows]) -> bool:
    """Whether every block is of what it would be made of now. The process that maps them has seen their pixels."""
    manifest = folder / MANIFEST
    blocks = _read(manifest) if manifest.exists() else {}
    for which, part in parts.items():
        starts, size = _cut(part)
        sources = [_hash_of_source(part, part.rows[start : start + size]) for start in starts]
        if [block.source for block in blocks.get(which, [])] != sources:
            return False
    return True


def _cut(part: FileRows) -> tuple[range, int]:
    """(first row of each block, rows in a block)."""
    size = max(1, BLOCK // max(1, part.nbytes // max(1, len(part))))
    return range(0, len(part), size), size


def _write_files(folder: Path, parts: dict[str, FileRows]) -> None:
    files.remove_leftovers(folder)
    files.write_text(folder / README, TEXT)
    manifest = folder / MANIFEST
    blocks = _read(manifest) if manifest.exists() else {}
    _check_disk(folder, parts)
    for which in blocks.keys() - parts.keys():
        _path(folder, which).unlink(missing_ok=True)
    blocks = {which: blocks.get(which, []) for which in parts}
    survey = next(iter(parts.values())).survey
    made = 0
    with survey.bar("images to disk") as bar:
        for which, part in parts.items():
            for now in _blocks(_path(folder, which), part, blocks[which], bar.update):
                made += now
                if now:
                    _write(manifest, blocks)
    if not manifest.exists():
        _write(manifest, blocks)
    logger.info("data: images are mapped from %s; %d of them were decoded now", folder, made)


def _blocks(path: Path, part: FileRows, blocks: list[Block], update: Callable[[int], None]) -> Iterator[int]:
    """Bring ``path`` and ``blocks`` up to date, block by block; yields how many images were decoded for each.

    A block is hashed and written while the next one is decoded, and is in ``blocks`` once it is on the disk.
    """
    survey, each = part.survey, part.nbytes // max(1, len(part))
    starts, size = _cut(part)
    buffers, at, written = np.empty((2, min(size, len(part)), *part.shape[1:]), np.uint8), 0, None
    with files.named(path), open(path, "r+b" if path.exists() else "w+b", buffering=0) as file:
        with ThreadPoolExecutor(1) as writer:
            for index, start in enumerate(starts):
                rows, buffer = part.rows[start : start + size], buffers[index % 2]
                source = _hash_of_source(part, rows)
                before = blocks[index] if index < len(blocks) else None
                if before and before.source == source and not before.skipped:
                    if written:  # its buffer is used again
                        yield _entered(blocks, *written)
                        written = None
                    if _same(file, at, before, buffer):
                        update(len(rows))
                        at += before.rows * each
                        continue
                done, tally = survey.fill(part.name, rows, buffer[: len(rows)], lambda: update(1))
                if written:
                    yield _entered(blocks, *written)
                    written = None
                survey.refuse_unreadable()
                pixels = buffer[: len(rows)] if done.all() else buffer[: len(rows)][done]
                written = index, writer.submit(_write_block, file, at, pixels, done, source, tally)
                at += len(pixels) * each
            if written:
                yield _entered(blocks, *written)
        file.truncate(at)
    del blocks[len(starts) :]


def _entered(blocks: list[Block], index: int, block: Future) -> int:
    """Enter a block that is on the disk; the number of its images."""
    blocks[index : index + 1] = [block.result()]
    return blocks[index].rows


def _write_block(file: BinaryIO, at: int, pixels: np.ndarray, done: np.ndarray, source: str, tally: Tally) -> Block:
    view = memoryview(pixels).cast("B")
    sha256, ahead = hashlib.sha256(view).hexdigest(), 0
    while ahead < len(view):
        ahead += os.pwrite(file.fileno(), view[ahead:], at + ahead)
    os.fsync(file.fileno())
    skipped = np.flatnonzero(~done).tolist()
    return Block(len(pixels), skipped, source, sha256, dict(tally.notes), list(tally.counts), list(tally.ends))


def _same(file: BinaryIO, at: int, block: Block, buffer: np.ndarray) -> bool:
    """Whether the pixels of ``block`` are those in ``file`` from ``at`` on; ``buffer`` is overwritten."""
    if block.rows > len(buffer):
        return False
    view = memoryview(buffer[: block.rows]).cast("B")
    return os.preadv(file.fileno(), [view], at) == len(view) and hashlib.sha256(view).hexdigest() == block.sha256


def _hash_of_source(part: FileRows, rows: np.ndarray) -> str:
    survey = part.survey
    scale = survey.scale and (survey.scale.black, survey.scale.white)
    digest = hashlib.sha256(repr((VERSION, PIL.__version__, survey.form, survey.shape, scale)).encode())
    for row in rows:
        file, header = survey.files[part.name][row]
        digest.update(repr((str(file), header, _identity(file))).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _identity(file: ImageFile) -> Any:
    """What changes with the content of ``file``."""
    if isinstance(file, Packed):
        return hashlib.sha256(file.content()).hexdigest()
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _check_disk(folder: Path, parts: dict[str, FileRows]) -> None:
    need = sum(part.nbytes for part in parts.values())
    present = sum(_path(folder, which).stat().st_size for which in parts if _path(folder, which).exists())
    free = shutil.disk_usage(folder).free
    if need - present > free:
        got = f"{need >> 20} MiB where {(free + present) >> 20} MiB are free in {folder.parent}"
        fail("data", "images, in 8 bit and one size,", "fit the disk", got)


def _read(manifest: Path) -> dict[str, list[Block]]:
    content = files.read_json(manifest, dict)
    try:
        return {which: [Block(**block) for block in blocks] for which, blocks in content.items()}
    except (TypeError, AttributeError) as error:
        raise UserError(f"{manifest} must hold blocks of images, got something else; remove its folder") from error


def _write(manifest: Path, blocks: dict[str, list[Block]]) -> None:
    files.write_json(manifest, {which: list(map(dataclasses.asdict, of)) for which, of in blocks.items()})


def _path(folder: Path, which: str) -> Path:
    return folder / f"{which}.u8"
