"""A folder belongs to one configuration: written on the first start, compared on every later one.

A run's folder (:func:`open_run`) has one process at a time, a data set's (:func:`open_shared`) any number.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import yaml

from kr_fast.runtime import files
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.layout import PRIVATE, README, RELEASE, Folder, readme

CONFIG, LOCK = "config.yaml", ".lock"
MANIFEST = "manifest.json"
_locks: list[int] = []  # held until the process ends, so that a kill frees them


def open_run(out: str | Path, config: dict[str, Any], where: str = "run") -> Path:
    """Create the run folder ``out`` for ``config``, or open it again.

    Args:
        where: the command, for its errors.
    Raises:
        UserError: if ``out`` is a file, holds something else, another configuration (the first differing key is
            named with both values), or is in use by another process.
    """
    out = Path(out)
    path, folder = out / CONFIG, Folder(out)
    if out.exists() and not out.is_dir():
        fail(where, "out", "be a folder", out)
    if path.exists():
        folder.check(where, "out")
        found = yaml.safe_load(path.read_text()) or {}
        for key in sorted(found.keys() | config.keys()):
            if found.get(key) != config.get(key):
                raise UserError(
                    f"{where}: {key} must equal {found.get(key)!r} of the run in {out}, got {config.get(key)!r}; "
                    "choose another --out to start a new run"
                )
    elif out.is_dir() and any(not _left_by_us(entry) for entry in out.iterdir()):
        fail(where, "out", "be empty or hold a run of kr-fast", out)
    out.mkdir(parents=True, exist_ok=True)
    _lock(out, where)
    files.remove_leftovers(out)
    folder.make()
    if not path.exists():
        files.write_text(path, yaml.safe_dump(config, sort_keys=False))
    return out


def open_shared(out: str | Path, values: dict[str, Any], where: str) -> Path:
    """Create the folder ``out`` for ``values`` (JSON), or open it again; other processes may be at work there.

    Raises:
        UserError: if ``out`` is a file, holds something else, or other values (the first differing entry is named
            with both values).
    """
    out = Path(out)
    path = out / MANIFEST
    if out.exists() and not out.is_dir():
        fail(where, "out", "be a folder", out)
    foreign = out.is_dir() and any(not _left_by_us(entry) for entry in out.iterdir())
    if foreign and not path.exists():  # asked last: another process may have started meanwhile
        fail(where, "out", "be empty or hold a data set of kr-fast", out)
    if not files.write_new(path, json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"):
        try:
            found, wanted = _flat(files.read_json(path)), _flat(values)
        except ValueError as error:
            raise UserError(f"{where}: {path} must hold the manifest of a data set, got {error}") from error
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise UserError(
                    f"{where}: {key} must equal {found.get(key)!r} of the data set in {out}, got {wanted.get(key)!r}; "
                    "choose another out to start a new one"
                )
    return out


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``, so that an error can name one entry."""
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _left_by_us(entry: Path) -> bool:
    """What a start that was killed at once can leave behind."""
    if entry.name in (RELEASE, PRIVATE):
        return entry.is_dir() and not any(entry.iterdir())
    if entry.name == README:
        return entry.is_file() and entry.read_text() == readme()
    temporary = entry.name.startswith((f".{CONFIG}.", f".{MANIFEST}.", f".{README}.")) and entry.suffix == ".tmp"
    return entry.name == LOCK or temporary


def _lock(out: Path, where: str) -> None:
    descriptor = os.open(out / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        fail(where, "out", "not be in use by another process", out)
    _locks.append(descriptor)


def release() -> None:
    """Give back the folders that this process holds."""
    while _locks:
        os.close(_locks.pop())
