"""Membership signals in files: one ``[A, N, M]`` array each, written in chunks, continued after a kill.

A folder holds ``<signal>.npy``, ``signals.json`` (what the numbers are functions of) and ``journal.json`` (how many
images are done). Room for everything is taken at the start, so a full disk is an error before the work; rows are
written by ``write`` and not through a memory map, whose full disk would be a signal that kills the process.
"""

import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.runtime.errors import fail, first_line
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.journal import Journal

RECORD, LOCK, STAGE = "signals.json", ".lock", "rows"


class SignalFiles:
    """The folder ``path`` for signals of ``shape`` ``[A, N, M]``; a context manager that holds its lock.

    Raises: UserError naming the first key of ``record`` that differs from the folder's, or if another process writes
        there; OSError for a full disk.
    """

    def __init__(self, path: str | Path, want: tuple[str, ...], shape: tuple[int, int, int], record: dict[str, Any]):
        self.path, self.want, self.shape = Path(path), want, shape
        if self.path.exists() and not self.path.is_dir():
            fail("ModelArray", "path", "be a folder", path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR)
        try:
            self._open(record)
        except BaseException:
            os.close(self.lock)
            raise

    def _open(self, record: dict[str, Any]) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail("ModelArray", "path", "not be in use by another process", self.path)
        files.remove_leftovers(self.path)
        known = self.path / RECORD
        if known.exists():
            written = files.read_json(known, dict)
            for key in sorted(written.keys() | record.keys()):
                if written.get(key) != record.get(key):
                    rule = f"have the {key} of the signals in it, {_short(written.get(key))}"
                    fail("ModelArray", "path", rule, _short(record.get(key)))
        else:
            for name in self.want:
                self._create(name)
            files.write_json(known, record)  # last: a folder with a record is whole
        self.journal = Journal(self.path)
        self.done = (self.journal.done(STAGE) or {"rows": 0}).get("rows")
        self._check_whole()
        self.started = time.monotonic()
        self.handles = {name: os.open(self._file(name), os.O_RDWR) for name in self.want}

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"

    def _check_whole(self) -> None:
        """Refuse a folder whose files are not those that its record tells of."""
        words = "have whole files in it (remove the folder to begin anew)"
        if not isinstance(self.done, int) or not 0 <= self.done <= self.shape[1]:
            fail("ModelArray", "path", words, f"{self.done} images in {self.journal.path}")
        for name in self.want:
            try:
                array = np.load(self._file(name), mmap_mode="r") if 0 not in self.shape else None
            except (OSError, ValueError, EOFError) as error:
                fail("ModelArray", "path", words, f"{self._file(name)} ({first_line(error)})")
            if array is not None and (array.shape != self.shape or array.dtype != np.dtype("<f4")):
                fail("ModelArray", "path", words, f"{array.dtype} {list(array.shape)} in {self._file(name)}")

    def _create(self, name: str) -> None:
        with files.atomic_path(self._file(name)) as temporary, open(temporary, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            size = 4 * int(np.prod(self.shape))
            if size:
                os.posix_fallocate(file.fileno(), file.tell(), size)

    def write(self, start: int, stop: int, values: Mapping[str, Tensor]) -> None:
        """Images ``[start, stop)``: name -> ``[A, stop - start, M]``; then they count as done."""
        queries, count, models = self.shape
        for name, handle in self.handles.items():
            offset = os.fstat(handle).st_size - 4 * queries * count * models
            rows = np.ascontiguousarray(values[name].numpy(), dtype="<f4")
            for a in range(queries):
                at = offset + 4 * models * (a * count + start)
                data = memoryview(rows[a].reshape(-1).view(np.uint8))
                while data:
                    written = os.pwrite(handle, data, at)
                    data, at = data[written:], at + written
            os.fsync(handle)
        self.done = stop
        self.journal.finish(STAGE, time.monotonic() - self.started, {"rows": stop})

    def read(self) -> dict[str, Tensor]:
        """name -> float32 ``[A, N, M]``, memory maps; what the caller writes into them stays in memory."""
        if 0 in self.shape:
            return {name: torch.empty(self.shape, dtype=torch.float32) for name in self.want}
        return {name: torch.from_numpy(np.load(self._file(name), mmap_mode="c")) for name in self.want}

    def __enter__(self) -> "SignalFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in (*self.handles.values(), self.lock):
            os.close(handle)


def recorded(path: str | Path | None, key: str) -> Any:
    """What the record in the folder ``path`` says of ``key``; None if there is none."""
    known = None if path is None else Path(path) / RECORD
    return files.read_json(known, dict).get(key) if known is not None and known.exists() else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
