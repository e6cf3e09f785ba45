"""A run folder belongs to one configuration: written on the first start, compared on every later one."""

import fcntl
import os
from pathlib import Path
from typing import Any

import yaml

from kr_fast.runtime import files
from kr_fast.runtime.errors import UserError, fail

CONFIG, LOCK = "config.yaml", ".lock"
_locks: list[int] = []  # held until the process ends, so that a kill frees them


def open_run(out: str | Path, config: dict[str, Any]) -> Path:
    """Create the run folder ``out`` for ``config``, or open it again.

    Raises:
        UserError: if ``out`` is a file, holds something else, another configuration (the first differing key is
            named with both values), or is in use by another process.
    """
    out = Path(out)
    path = out / CONFIG
    if out.exists() and not out.is_dir():
        fail("run", "out", "be a folder", out)
    if path.exists():
        found = yaml.safe_load(path.read_text()) or {}
        for key in sorted(found.keys() | config.keys()):
            if found.get(key) != config.get(key):
                raise UserError(
                    f"run: {key} must equal {found.get(key)!r} of the run in {out}, got {config.get(key)!r}; "
                    "choose another --out to start a new run"
                )
    elif out.is_dir() and any(not _left_by_us(entry) for entry in out.iterdir()):
        fail("run", "out", "be empty or hold a run of kr-fast", out)
    out.mkdir(parents=True, exist_ok=True)
    _lock(out)
    files.remove_leftovers(out)
    if not path.exists():
        files.write_text(path, yaml.safe_dump(config, sort_keys=False))
    return out


def _left_by_us(entry: Path) -> bool:
    """What a start that was killed at once can leave behind."""
    return entry.name == LOCK or (entry.name.startswith(f".{CONFIG}.") and entry.name.endswith(".tmp"))


def _lock(out: Path) -> None:
    descriptor = os.open(out / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        fail("run", "out", "not be in use by another process", out)
    _locks.append(descriptor)


def release() -> None:
    """Give back the folders that this process holds."""
    while _locks:
        os.close(_locks.pop())
