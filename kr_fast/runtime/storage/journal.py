"""Records of what is finished: the stages of a run, and the parts of a job that many processes share."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from kr_fast.runtime.errors import UserError, first_line
from kr_fast.runtime.storage import files

NAME = "journal.json"
MISSING = "none"  # in place of a file that does not exist


class Journal:
    """The file ``journal.json`` of a run folder, rewritten atomically at the end of each stage.

    An entry holds the stage's seconds and result, and size and SHA-256 of the files that it left.
    Raises: UserError naming the file where it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / NAME
        self._stages: dict[str, dict] = {}
        self.reload()

    def reload(self) -> None:
        """Read what another process may have written."""
        self._stages = files.read_json(self.path, dict) if self.path.exists() else {}
        for stage, entry in self._stages.items():
            if not _is_entry(entry):
                raise UserError(f"{self.path} must hold the entries of finished stages, got another value for {stage}")

    def done(self, stage: str) -> dict[str, Any] | None:
        """The stage's result, or None if it has not been finished."""
        entry = self._stages.get(stage)
        return None if entry is None else _Result(entry["result"], stage, self.path)

    def finish(self, stage: str, seconds: float, result: dict[str, Any], left: Iterable[Path] = ()) -> None:
        """Record ``stage`` as finished, with the files ``left``; of a folder among them, all files in it."""
        entry: dict[str, Any] = {"seconds": seconds, "result": result}
        if digests := {path.relative_to(self.folder).as_posix(): _digest(path) for path in sorted(_files(left))}:
            entry["files"] = digests
        files.write_json(self.path, {**self._stages, stage: entry})
        self._stages[stage] = entry

    def forget(self, stage: str) -> None:
        """Mark ``stage`` as unfinished."""
        rest = {name: entry for name, entry in self._stages.items() if name != stage}
        files.write_json(self.path, rest)
        self._stages = rest

    def digest(self, *stages: str) -> str:
        """SHA-256 over the digests of all files that ``stages`` left: it identifies what is made from them."""
        left = [self._stages.get(stage, {}).get("files", {}) for stage in stages]
        return hashlib.sha256(json.dumps(left, sort_keys=True).encode()).hexdigest()

    def changed(self, stage: str, below: Path | None = None) -> Iterator[tuple[Path, str]]:
        """Files of ``stage`` that are not as it left them, and what is wrong with each; ``below``: in this folder."""
        for name, facts in self._stages.get(stage, {}).get("files", {}).items():
            path = self.folder / name
            if below is not None and below not in path.parents:
                continue
            if not path.is_file():
                yield path, MISSING
            elif (size := path.stat().st_size) != facts["bytes"]:
                yield path, f"{size} bytes in place of {facts['bytes']}"
            elif files.sha256(path) != facts["sha256"]:
                yield path, "other bytes"

    def check(self, stage: str, where: str, below: Path | None = None) -> None:
        """Raises: UserError naming the first of :meth:`changed`."""
        for path, got in self.changed(stage, below):
            refuse(self, stage, where, path, got)

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, in the order in which they were finished."""
        return {stage: entry["seconds"] for stage, entry in self._stages.items()}


class _Result(dict):
    """A stage's result; the error of a missing key names the file, which another version may have written."""

    def __init__(self, result: dict[str, Any], stage: str, path: Path):
        super().__init__(result)
        self._words = f"{path} must be of this version of kr-fast, and as it was left: the result of {stage} has no"

    def __missing__(self, key: str) -> NoReturn:
        raise UserError(f"{self._words} {key}; delete its entry and those after it to make them again")


def refuse(journal: Journal, stage: str, where: str, path: Path, got: str) -> NoReturn:
    """Raise that the file ``path`` of ``stage`` is not as the stage left it, with what can be done."""
    unit = journal.folder.joinpath(*path.relative_to(journal.folder).parts[:3])  # a checkpoint is a folder
    raise UserError(
        f"{where}: {path} must be as the stage {stage} left it, got {got}; put it back, or make it again with what "
        f'follows from it: delete {unit}, and the entries from "{stage}" on in {journal.path}'
    )


def check_inside(folder: str | Path, where: str) -> None:
    """If ``folder`` lies in that of a run, refuse files in it that are not as their stage left them."""
    folder = Path(folder).resolve()
    for parent in list(folder.parents)[:2]:
        if (parent / NAME).is_file():
            journal = Journal(parent)
            for stage in journal.seconds():
                journal.check(stage, where, folder)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("result"), dict):
        return False
    left = entry.get("files", {})
    known = isinstance(left, dict) and all(
        isinstance(each, dict) and isinstance(each.get("bytes"), int) and isinstance(each.get("sha256"), str)
        for each in left.values()
    )
    return known and isinstance(entry.get("seconds"), int | float)


def _files(left: Iterable[Path]) -> Iterator[Path]:
    for path in left:
        inside = path.rglob("*") if path.is_dir() else [path]
        yield from (each for each in inside if each.is_file() and not files.is_temporary(each))


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


class PartJournal:
    """Records of finished parts, one JSON line each, in ``folder``: every process appends to a file of its own.

    So no file has two writers, whatever the file system. A line is synced before :meth:`append` returns; a last line
    that was cut off by a kill is not a record. ``types``: the keys that a record must have, and the type of each.
    """

    def __init__(self, folder: str | Path, types: Mapping[str, type] | None = None):
        self.folder, self.types = Path(folder), dict(types or {})
        self._read: dict[str, int] = {}  # bytes of each file that are known
        self._own: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add one record."""
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{secrets.token_hex(8)}.jsonl"
            self._own = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            files.sync(self.folder)
        line, before = json.dumps(record, allow_nan=False).encode() + b"\n", os.fstat(self._own).st_size
        with files.named(self.folder):
            if os.write(self._own, line) != len(line):
                os.ftruncate(self._own, before)  # half a record would spoil the one that follows it
                raise OSError(f"{self.folder}: a record could not be written whole; is the disk full?")
            os.fsync(self._own)

    def new(self) -> list[dict[str, Any]]:
        """Records that this object has not returned before, of all processes."""
        records = []
        for path in sorted(self.folder.glob("*.jsonl")):
            known = self._read.get(path.name, 0)
            with files.named(path), open(path, "rb") as file:
                file.seek(known)
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                records += [self._record(path, line) for line in whole.split(b"\n")]
                self._read[path.name] = known + len(whole) + 1
        return records

    def _record(self, path: Path, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            for key, kind in self.types.items():
                if not isinstance(record[key], kind):
                    raise ValueError(f"{key} is {record[key]!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            start = line[:40].decode(errors="replace")
            rule = "hold one record of a finished part on each line"
            raise UserError(f"{path} must {rule}, got {start!r} ({why}); delete this line") from error
        return record

    def close(self) -> None:
        """Close this process's file."""
        if self._own is not None:
            os.close(self._own)
            self._own = None
