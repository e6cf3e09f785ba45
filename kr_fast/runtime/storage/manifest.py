"""A folder belongs to one configuration: written on the first start, compared on every later one.

A run's folder (:func:`open_run`) has one process at a time, a data set's (:func:`open_shared`) any number. A folder in
which nothing has been made yet may be used by another configuration.
"""

import dataclasses
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import yaml

from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.layout import PRIVATE, README, RELEASE, Folder, readme

CONFIG, LOCK = "config.yaml", ".lock"
# What PyYAML raises for files that are no YAML, and for values that are not of the type that they name (!!bool x).
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError, OverflowError)
MANIFEST, CLAIMS, JOURNAL = "manifest.json", ".claims", "journal"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_locks: list[int] = []  # held until the process ends, so that a kill frees them


def read_config(path: Path) -> dict[str, Any]:
    """The options in ``config.yaml``. Raises: UserError naming the file where it is damaged."""
    try:
        with files.named(path):
            text = path.read_text()
        options = yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise UserError(f"{path} must hold options in YAML, got a damaged file ({first_line(error)})") from error
    if not isinstance(options, dict) or not options or not all(isinstance(key, str) for key in options):
        raise UserError(f"{path} must hold options in YAML, got {'nothing' if not options else 'something else'}")
    if not text.endswith("\n"):  # it may be whole YAML whose last value is cut
        raise UserError(f"{path} must hold options in YAML, got a file whose end is missing")
    return options


def check_run(out: str | Path, config: dict[str, Any], where: str = "run", moved: tuple[str, ...] = ()) -> bool:
    """Whether something of a run of ``config`` is in ``out``; False if one can begin there. Nothing is written.

    Args:
        where: the command, for its errors.
        moved: options that may differ, as their files are identified by their content.
    Raises:
        UserError: if ``out`` or a folder above it is a file, cannot be written to, holds something else, or something
            made by another configuration (the first differing key is named with both values).
    """
    out = Path(out)
    path, folder = out / CONFIG, Folder(out)
    there = _check_folder(out, where)
    if not os.access(there, os.W_OK | os.X_OK):
        fail(where, "out", "lie in a folder that can be written to", f"{out}, but {there} cannot")
    if not path.exists():
        if out.is_dir() and any(not _left_by_run(entry) for entry in out.iterdir()):
            fail(where, "out", f"be empty or hold {'an audit' if where == 'audit' else 'a run'} of kr-fast", out)
        return False
    folder.check(where, "out")
    if not any(each.is_file() for part in (folder.release, folder.private) for each in part.rglob("*")):
        return False
    before = read_config(path)
    keys = sorted(before.keys() | config.keys(), key=lambda key: (key != "command", key))  # which says most
    key = next((key for key in keys if key not in moved and _differ(before, config, key)), None)
    if key is None:
        return True
    if key not in before or key not in config:
        rule = "hold the options of this version of kr-fast"
        raise UserError(
            f"{where}: {path} must {rule}, got {'no' if key in config else 'an unknown'} {key}; choose another --out"
        )
    raise UserError(
        f"{where}: {key} must equal {before[key]!r} of the run in {out}, got {config[key]!r}; "
        "choose another --out to start a new run"
    )


def _check_folder(out: Path, where: str) -> Path:
    """Refuse a file, a link to nothing, and what lies below a file; returns the part of ``out`` that is there."""
    if os.path.lexists(out) and not out.is_dir():
        fail(where, "out", "be a folder", out)
    there = next(above for above in (out, *out.absolute().parents) if os.path.lexists(above))
    if not there.is_dir():
        fail(where, "out", "be a folder", f"{out}, but {there} is a file")
    return there


def open_run(out: str | Path, config: dict[str, Any], where: str = "run", moved: tuple[str, ...] = ()) -> Path:
    """Create the run folder ``out`` for ``config``, or open it again, and lock it until :func:`release`.

    Args, Raises: as :func:`check_run`; UserError also if ``out`` is in use by another process.
    """
    out = Path(out)
    path, folder = out / CONFIG, Folder(out, bool(config.get("epsilon")))
    check_run(out, config, where, moved)
    out.mkdir(parents=True, exist_ok=True)
    _lock(out, where)
    begun = check_run(out, config, where, moved)  # another process may have been at work in between
    files.remove_leftovers(*folder.made())
    folder.make()
    if not begun:
        folder.journal.unlink(missing_ok=True)
    if not begun or read_config(path) != config:
        files.write_text(path, yaml.safe_dump(config, sort_keys=False))
    return out


def refuse_inside(out: str | Path, source: str | Path, where: str) -> None:
    """Refuse an ``out`` inside the folder of images ``source``: its files would be read as images of a class."""
    if source and Path(source).is_dir() and Path(out).resolve().is_relative_to(Path(source).resolve()):
        fail(where, "out", f"lie outside data, the folder {source}", out)


@dataclasses.dataclass
class Shared:
    """The folder of a data set that this process works in, until :meth:`close`."""

    out: Path
    lock: int | None

    def close(self) -> None:
        """Unlock the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def open_shared(out: str | Path, values: dict[str, Any], where: str) -> Shared:
    """Create the folder ``out`` for ``values`` (JSON), or open it again; other processes may be at work there.

    Raises:
        UserError: if ``out`` is a file, holds something else, or belongs to other values while a part of their data set
            exists or a process works on it (the first differing entry is named with both values).
    """
    out = Path(out)
    path = out / MANIFEST
    _check_folder(out, where)
    foreign = out.is_dir() and any(not _left_by_set(entry) for entry in out.iterdir())
    if foreign and not path.exists():  # asked last: another process may have started meanwhile
        fail(where, "out", "be empty or hold a data set of kr-fast", out)
    if path.exists():
        _read(path, where)
    out.mkdir(parents=True, exist_ok=True)
    data = json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"
    shared = Shared(out, os.open(out / LOCK, os.O_CREAT | os.O_RDWR, 0o644))
    try:
        alone = _flock(shared.lock, fcntl.LOCK_EX | fcntl.LOCK_NB, out / LOCK)
        empty = alone and path.exists() and all(_left_by_set(entry) for entry in out.iterdir())
        if empty and values.keys() == _read(path, where).keys():
            path.unlink()  # without a shard other values may take the folder
        _flock(shared.lock, fcntl.LOCK_SH, out / LOCK)
        if not files.write_new(path, data) and (difference := _difference(path, values, where)):
            key, before, now = difference
            raise UserError(
                f"{where}: {key} must equal {before!r} of the data set in {out}, got {now!r}; "
                "choose another out to start a new one"
            )
    except BaseException:
        shared.close()
        raise
    return shared


def _difference(path: Path, values: dict[str, Any], where: str) -> tuple[str, Any, Any] | None:
    """The first entry in which the manifest differs from ``values``, with both values."""
    before, now = _flat(_read(path, where)), _flat(values)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        return files.read_json(path, dict)
    except UserError as error:
        raise UserError(f"{where}: {path} must hold the manifest of a data set, got another file ({error})") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``, so that an error can name one entry."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _differ(before: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    """Whether the option ``key`` has another value; one file or folder may be named in several ways."""
    if key not in before or key not in now or type(before[key]) is not str or type(now[key]) is not str:
        return key not in before or key not in now or before[key] != now[key]
    return before[key] != now[key] and not _same_file(before[key], now[key])


def _same_file(first: str, second: str) -> bool:
    try:
        return bool(first and second) and os.path.samefile(first, second)
    except (OSError, ValueError):
        return False


def _left_by_run(entry: Path) -> bool:
    """Whether a run that was killed at its start can have left ``entry``."""
    if entry.name in (RELEASE, PRIVATE):
        return entry.is_dir() and not any(entry.iterdir())
    if entry.name == README:
        return entry.is_file() and entry.read_bytes() in (readme().encode(), readme(True).encode())
    return entry.name == LOCK or _is_ours(entry, CONFIG, README)


def _left_by_set(entry: Path) -> bool:
    """Whether ``entry`` belongs to a data set without any shard."""
    if entry.name == JOURNAL:
        return entry.is_dir() and all(path.suffix == ".jsonl" and path.stat().st_size == 0 for path in entry.iterdir())
    return entry.name in (LOCK, CLAIMS, MANIFEST) or _is_ours(entry, MANIFEST, "shard-")


def _is_ours(entry: Path, *starts: str) -> bool:
    return files.is_temporary(entry) and entry.name.startswith(tuple(f".{start}" for start in starts))


def _flock(descriptor: int, how: int, path: Path) -> bool:
    """Whether the lock was taken; False on a file system without locks too."""
    try:
        with files.named(path):
            fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _lock(out: Path, where: str) -> None:
    descriptor = os.open(out / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        with files.named(out / LOCK):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        fail(where, "out", "not be in use by another process", out)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        logger.warning("%s: no file locks in this folder (%s): start no second process on it", where, error)
    _locks.append(descriptor)


def release() -> None:
    """Unlock the folders of this process."""
    while _locks:
        os.close(_locks.pop())
