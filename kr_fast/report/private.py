"""Banners of pages that show private data, and what pages leave out because it names people or machines."""

import re
import shlex
from pathlib import Path
from typing import Any


def banner(real_images: bool, records: bool) -> str:
    """The words at the top of a page that shows real images or single records; nothing for one that shows neither."""
    parts = [words for words, shown in (("real images", real_images), ("single records", records)) if shown]
    if not parts:
        return ""
    return (
        f"This page shows {' and '.join(parts)} of the private data, because it was asked for. It must not leave the "
        "institution that owns them."
    )


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration for a page, with only the last part of every path: folders name machines and people."""
    return {key: _last(value) for key, value in config.items()}


def repeated(command: str, config: Path) -> str:
    """The command that repeats ``kr-fast COMMAND``, run from the folder above its own: a page names no other folder."""
    out = config.resolve().parent.name
    return shlex.join(["kr-fast", command, "--config", f"{out}/{config.name}", "--out", out])


def _last(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_last(each) for each in value]
    # NAME=FILE@MODEL and A,B hold several names.
    return re.sub(r"[^=,@]*/", "", value) if isinstance(value, str) else value
