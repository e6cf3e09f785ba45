"""What is finished: the stages of a run, and the parts of a job that many processes share. Nothing is done twice."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from kr_fast.runtime import files


class Journal:
    """The file ``journal.json`` of a run folder, rewritten atomically at the end of each stage."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "journal.json"
        self._stages: dict[str, dict] = {}
        self.reload()

    def reload(self) -> None:
        """Read what another process may have written."""
        self._stages = files.read_json(self.path) if self.path.exists() else {}

    def done(self, stage: str) -> dict[str, Any] | None:
        """The stage's result, or None if it has not been finished."""
        entry = self._stages.get(stage)
        return None if entry is None else entry["result"]

    def finish(self, stage: str, seconds: float, result: dict[str, Any]) -> None:
        """Record ``stage`` as finished."""
        self._stages[stage] = {"seconds": seconds, "result": result}
        files.write_json(self.path, self._stages)

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, in the order in which they were finished."""
        return {stage: entry["seconds"] for stage, entry in self._stages.items()}


class PartJournal:
    """Records of finished parts, one JSON line each, in ``folder``: every process appends to a file of its own.

    So no file has two writers, whatever the file system. A line is synced before :meth:`append` returns; a last line
    that was cut off by a kill is not a record.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._read: dict[str, int] = {}  # bytes of each file that are known
        self._own: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add one record."""
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{secrets.token_hex(8)}.jsonl"
            self._own = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            files.sync(self.folder)
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if os.write(self._own, line) != len(line):
            raise OSError(f"{self.folder}: a record could not be written whole; is the disk full?")
        os.fsync(self._own)

    def new(self) -> list[dict[str, Any]]:
        """Records that this object has not returned before, of all processes."""
        found = []
        for path in sorted(self.folder.glob("*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._read.get(path.name, 0))
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self._read[path.name] = self._read.get(path.name, 0) + len(whole) + 1
                found += [json.loads(line) for line in whole.splitlines()]
        return found

    def close(self) -> None:
        """Close this process's file."""
        if self._own is not None:
            os.close(self._own)
            self._own = None
