"""Arrays from files that somebody else wrote: checked by their headers before any memory is taken for them.

``numpy.load`` allocates what a member's header claims, blocks on a pipe, and raises a dozen kinds of errors for damaged
files. Here only what is requested is read, sizes in headers are compared with the file, and whatever is wrong is one
:class:`UserError` that names the file.
"""

import io
import lzma
import math
import os
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kr_fast.runtime.errors import UserError, first_line
from kr_fast.runtime.memory import free_memory

MAGIC = b"\x93NUMPY"
SIGNATURES = {
    MAGIC: "it is an .npy file",
    b"\x89HDF": "it is an HDF5 file, as Keras writes",
    b"\x1f\x8b": "it is compressed by gzip; gunzip makes the file of it",
    b"\x80": "it is a pickle, which is not read",
}
BLOCK = 1 << 24
# What readers raise for damaged files.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, SyntaxError, OverflowError, TypeError, tokenize.TokenError)
DAMAGE += (zlib.error, lzma.LZMAError, zipfile.BadZipFile, zipfile.LargeZipFile)


class Npz:
    """The open ``.npz`` of :func:`open_npz`: names in ``keys``, one array at a time from :meth:`read`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, what: str):
        self.path, self._archive, self._what = path, archive, what
        self.keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def read(self, key: str) -> np.ndarray:
        """The array ``key`` in native byte order. Raises: UserError naming file and key."""
        with damage(f"{self._what} must hold a readable array {key}", self.path):
            info = self._archive.getinfo(f"{key}.npy")
            if info.flag_bits & 1:
                raise ValueError("it is encrypted")
            with self._archive.open(info) as file:
                return _read(file, info.file_size)


@contextmanager
def open_npz(path: str | Path, where: str, argument: str = "source") -> Iterator[Npz]:
    """The ``.npz`` at ``path``, of which nothing but the table of contents has been read.

    Args:
        where, argument: for errors, ``where: argument must ...``.
    Raises: UserError naming the file, and why it cannot be read; FileNotFoundError.
    """
    path, what = Path(path), f"{where}: {argument}"
    regular_file(path, what)
    with damage(f"{what} must be a readable .npz file", path):
        with open(path, "rb") as file:
            start = file.read(512)
        if why := _why_not_numpy(start):
            raise ValueError(why)
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise ValueError(
                "it is damaged or cut short" if start.startswith(b"PK") else "it is no .zip file"
            ) from None
    with archive:
        yield Npz(path, archive, what)


def read_npy(path: str | Path, where: str, argument: str) -> np.ndarray:
    """The array of an ``.npy`` file in native byte order.

    Raises: UserError naming the file, and why it cannot be read; FileNotFoundError.
    """
    path, what = Path(path), f"{where}: {argument}"
    regular_file(path, what)
    with damage(f"{what} must be a readable .npy file", path), open(path, "rb") as file:
        start = file.read(512)
        file.seek(0)
        if not start.startswith(MAGIC):
            other = "it is an .npz file" if start.startswith(b"PK") else "it does not start as one"
            raise ValueError(_why_not_numpy(start) or other)
        return _read(file, os.fstat(file.fileno()).st_size)


def npy_of(content: bytes, what: str) -> np.ndarray:
    """The array of the bytes of an ``.npy`` file, as :func:`read_npy`. Raises: UserError, which ``what`` starts."""
    try:
        return _read(io.BytesIO(content), len(content))
    except (*DAMAGE, MemoryError) as error:
        raise UserError(f"{what} must be a readable .npy array, got a damaged one ({first_line(error)})") from error


def _why_not_numpy(start: bytes) -> str | None:
    if start.startswith(b"PK") and b"/data.pkl" in start:
        return "it is a file of torch.save; numpy.save or numpy.savez writes its tensors, as x.numpy()"
    return other_format(start)


def other_format(start: bytes) -> str | None:
    """What a file that should be an archive is instead, by its first 512 bytes; None if they do not show it."""
    text = start.lstrip().lower()
    if not start:
        return "the file is empty"
    if start.startswith(b"version ") and b"git-lfs" in start:
        return "it is a Git LFS pointer and not the file itself; git lfs pull fetches it"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if text.startswith(b"{"):
        return "it is JSON"
    return next((what for start_of, what in SIGNATURES.items() if start.startswith(start_of)), None)


def other_format_of(path: Path) -> str | None:
    """As :func:`other_format`, of the file at ``path``; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return other_format(file.read(512))
    except OSError:
        return None


def regular_file(path: Path, what: str) -> None:
    """Refuse a folder, and a pipe or device, on which a reader would block; ``what`` starts the error."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} must be a file, got {path}, which is not there") from None
    except OSError as error:
        raise UserError(f"{what} must be a readable file, got {path} ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{what} must be a regular file, got {path}")


@contextmanager
def damage(rule: str, path: Path) -> Iterator[None]:
    """Raise whatever a library raises for a damaged file as one error, ``RULE, got PATH (why)``."""
    try:
        yield
    except UserError:
        raise
    except (*DAMAGE, MemoryError, KeyError) as error:
        raise UserError(f"{rule}, got {path} ({first_line(error)})") from error


def _read(file: BinaryIO | Any, size: int) -> np.ndarray:
    """The array in ``file``, which holds ``size`` bytes in all."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version[0]}.{version[1]} of the format is not known")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read; of text, x.astype(str) can be saved")
    if dtype.names is not None or dtype.subdtype is not None:
        raise ValueError("it holds records and not numbers")
    claimed, present = math.prod(shape) * dtype.itemsize, size - file.tell()
    if min(shape, default=0) < 0 or claimed > present:
        raise ValueError(f"its header claims {claimed} bytes and the file holds {present}")
    if claimed > (free := free_memory()):
        raise ValueError(f"it needs {claimed >> 20} MiB of memory and {free >> 20} MiB are free")
    flat = np.empty(claimed, np.uint8)
    view, at = memoryview(flat), 0
    while at < claimed:
        if not (count := file.readinto(view[at : at + BLOCK])):
            raise ValueError(f"it ends after {at} of {claimed} bytes")
        at += count
    if claimed == present:
        file.read(1)  # the check sum of a member is compared at its end
    values = np.frombuffer(flat, dtype) if dtype.itemsize else np.zeros(math.prod(shape), dtype)
    return native(values.reshape(shape, order="F" if fortran else "C"))


def native(values: np.ndarray) -> np.ndarray:
    """In this machine's byte order, and in float64 if wider (``longdouble``): torch has neither."""
    if values.dtype.kind in "fc" and values.dtype.itemsize > (8 if values.dtype.kind == "f" else 16):
        return values.astype(np.float64 if values.dtype.kind == "f" else np.complex128)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))
